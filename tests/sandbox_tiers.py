"""Which sandboxes the tests can use here, and the check that a test leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ordinary_user
import psutil
import pytest

from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import pool

BACKENDS = ["worker", "jupyter"]


BLOCKS: set[range] = set()
"""The user ids of the sandboxes seen so far."""


def _tier(name: str, label: str | None = None) -> Any:
    reason = sandbox.missing(name)
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"no {name} here: {reason}"), id=label)


FULL = ("bubblewrap", "namespaces")
TIERS = [_tier(name) for name in (*FULL, "landlock")]
FULL_TIERS = TIERS[:2]
ONE_OF_EACH = [
    _tier(next((name for name in FULL if not sandbox.missing(name)), FULL[0]), "full"),
    _tier("landlock", "reduced"),
]
"""The best full tier here, and the reduced one: the two full tiers have the same sessions."""


def _dealt() -> list[object]:
    """(tier, backend): every second pair where the tests run as root, the others as the ordinary user that root starts.

    So CI runs each pair once; `make soak` the rest. Where nobody is root every pair is run.
    """
    pairs = [(tier, backend) for tier in TIERS for backend in BACKENDS]
    mine = {0: 0, ordinary_user.UID: 1}.get(os.geteuid())
    found = []
    for number, (tier, backend) in enumerate(pairs):
        column = (number // 2 + number) % 2  # of each tier one backend, of each backend several tiers
        marks = [*tier.marks, *([] if mine in (None, column) else [pytest.mark.soak])]
        found.append(pytest.param(*tier.values, backend, marks=marks, id=f"{tier.values[0]}-{backend}"))
    return found


DEALT = _dealt()


def family(tier: str) -> list[psutil.Process]:
    """The sandbox's own processes: in a full tier bubblewrap (or its stand-in), the zygote and the template."""
    outermost = psutil.Process(pool.SANDBOXES[tier].process.pid)
    if sandbox.tier(tier).isolation != "full":
        return [outermost]
    (zygote,) = outermost.children()
    return [outermost, zygote, min(zygote.children(), key=lambda process: process.create_time())]


def processes() -> set[int]:
    """This process's descendants, and all processes of the users that only sessions have."""
    BLOCKS.update(box.uids for box in pool.SANDBOXES.values())
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter(["uids"]):
        uids = process.info["uids"]
        if uids and (any(uids.real in block for block in BLOCKS) or uids.real == os.getuid() == 61_500):
            mine.add(process.pid)
    return mine - {os.getpid()}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def scratch() -> set[str]:
    """This process's folders; other runs on the machine have their own."""
    return {path.name for path in Path(tempfile.gettempdir()).glob(f"llm-gym-*-{os.getpid()}-*")}


SECONDS = str(1_000_000 + os.getpid())
"""Of sleep; another run of these tests on the machine sleeps for other ones."""


def sleeper() -> str:
    """A cell that leaves three processes, each a session of its own."""
    return f"import subprocess\nfor _ in range(3): subprocess.Popen(['sleep', '{SECONDS}'], start_new_session=True)"


def sleepers() -> list[psutil.Process]:
    """What such cells have left."""
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", SECONDS]]


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether the condition comes true; the deadline only bounds a failing test."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def nothing_left(*, descriptors_too: bool = True) -> Iterator[None]:
    """The block, then `shutdown()`, leave no process, thread, descriptor or temporary file."""
    sandbox.shutdown()
    before, threads, open_files, files = processes(), threading.active_count(), descriptors(), scratch()
    yield
    processes()
    sandbox.shutdown()
    assert within(60, lambda: processes() <= before), [psutil.Process(p) for p in processes() - before]
    assert threading.active_count() <= threads, threading.enumerate()
    assert not descriptors_too or descriptors() <= open_files, [
        os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.exists()
    ]
    assert scratch() <= files, scratch() - files
