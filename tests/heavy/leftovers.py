"""What processes may leave behind: others that live on, and files in shared memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import psutil


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; one that nobody has waited for yet has."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def session(leader: int) -> list[psutil.Process]:
    """The living processes of the session that this process leads, or led."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return living(found)


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Files in /dev/shm that these processes have open or mapped, or that carry their number."""
    numbers = "|".join(map(str, pids))
    found = {str(file) for file in Path("/dev/shm").iterdir() if re.search(rf"-({numbers})(?!\d)", file.name)}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {line.split()[-1] for line in maps.splitlines() if "/dev/shm/" in line}
    return found


def existing(files: Iterable[str]) -> list[str]:
    return [file for file in files if Path(file).exists()]
