"""One writer at a time: a file that a process locks as long as it lives, with its name in it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import IO

from llm_gym.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, IO[str]] = {}
"""The files that this process has locked."""


def hold(file: Path) -> None:
    """Locks `file`, which is made if it is not there; nothing if this process holds it already.

    The lock is POSIX's: it ends with the process, however that ends, and no child inherits it.

    Raises:
        CheckpointError: another process holds it; names it.
        OSError: it cannot be written.
    """
    path = file.resolve()
    if path in _held or fcntl is None:
        return
    opened = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        opened.seek(0)
        who = opened.read().strip() or "another process"
        opened.close()
        raise CheckpointError(
            f"out: {str(file.parent)!r} is being written by {who}; end that run first, or choose another folder."
        ) from error
    except OSError:  # a file system without locks
        opened.close()
        return
    opened.truncate(0)
    opened.write(f"process {os.getpid()} on {socket.gethostname()}")
    opened.flush()
    _held[path] = opened


def release(file: Path) -> None:
    """Lets others hold it; may be called twice."""
    if (opened := _held.pop(file.resolve(), None)) is not None:
        opened.close()
