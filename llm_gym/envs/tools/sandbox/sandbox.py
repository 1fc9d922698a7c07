"""One sandbox per trainer and tier: the zygote's process, seen from the trainer."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, TypeVar

from llm_gym.envs.tools.sandbox import isolation
from llm_gym.envs.tools.sandbox.guest.wire import Channel, poll
from llm_gym.envs.tools.sandbox.limits import Limits

logger = logging.getLogger(__name__)

WARMED = ("numpy", "numpy.random", "sympy")
"""Packages that are imported before any fork, where they are installed, so that no session has to.

numpy imports its `random` when it is first used, and seeding uses it: 6 MB of every session's own.
"""
FULL_TIERS = ("bubblewrap", "namespaces")
START_SECONDS = 120.0
OTHERS = 1024
"""Processes and threads that the other sessions may yet start, where the kernel counts those of a user together."""
RELAY_SECONDS = 10.0
"""In which an interrupt must have been relayed; else the session is ended."""
END_SECONDS = 60.0
"""How long an end is waited for. It comes all the same: a thousand processes take seconds on a busy machine."""
UIDS = 50_000
"""User ids of one trainer's sessions, where there are enough."""


class SandboxError(RuntimeError):
    """The sandbox, or a session in it, could not be started."""


class Handle:
    """A session's processes, seen from the trainer; this kind is the worker.

    Args:
        namespaces: the session has a pid namespace of its own, so killing its first process ends it.
    """

    personality = "worker"
    most_ready = 64
    """As many are kept ready at most; 6 MB each."""

    def __init__(self, namespaces: bool) -> None:
        self.lease, far_lease = Channel.pair()  # closing it ends the session
        self.cells, far_cells = Channel.pair()  # the conversation with the session itself
        self.namespaces = namespaces
        self.pidfd: int | None = None
        self.ready = self.ended = False
        self._far = [far_lease.detach(), far_cells.detach()]

    def request(self) -> dict[str, Any]:
        """What the personality needs to be told at its start."""
        return {}

    def send(self, control: Channel, request: dict[str, Any]) -> bool:
        """Hands the session's ends of everything to the zygote; whether it still listens."""
        sent = control.send({**request, **self.request(), "personality": self.personality}, self._far)
        while self._far:
            os.close(self._far.pop())
        return sent

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Returns once the session takes cells; raises SandboxError."""
        deadline = time.monotonic() + seconds
        while not (self.ready and (self.pidfd is not None or sys.platform != "linux")):
            if not self.lease.pending() and not poll([self.lease], deadline - time.monotonic()):
                raise SandboxError(f"a session of the sandbox was not ready after {seconds:.0f} s.")
            self.take()

    def take(self) -> None:
        """Takes one message of those that start the session; SandboxError if it says that it cannot."""
        message, fds = self.lease.receive(fds=1)
        if message is None or "error" in message:
            raise SandboxError(f"a session of the sandbox could not start: {(message or {}).get('error', 'it died')}")
        if fds:  # the zygote sends one, the reaper none; the kernel may hand it over with the reaper's message
            self.pidfd = fds[0]
        self.ready = self.ready or "ready" in message

    def alive(self) -> bool:
        """Whether its processes still run."""
        return not self.ended and not (self.ready and poll([self.lease], 0))

    def interrupt(self) -> bool:
        """SIGINT to the session's process group, relayed by its reaper; whether it has been sent, or nobody is left.

        Not before that may another cell be started: the signal would be that cell's.
        """
        self.lease.send({"interrupt": True})
        deadline = time.monotonic() + RELAY_SECONDS
        while self.lease.pending() or poll([self.lease], deadline - time.monotonic()):
            message, _ = self.lease.receive()
            if message is None or "interrupted" in message:
                return True
        return False

    def end(self) -> None:
        """Kills everything the session started and waits until it is gone. Twice is once."""
        if self.ended:
            return
        self.ended = True
        if self.namespaces and self.pidfd is not None:  # its pid 1: the kernel kills the rest
            _kill(self.pidfd)
        self.lease.sock.shutdown(2)  # a forked child of the trainer may hold it open
        # Never killed where it is no pid 1: it is all that ends what the session started.
        if self.pidfd is not None and not poll([self.pidfd], END_SECONDS):
            logger.warning("a session of the sandbox takes more than %.0f s to end.", END_SECONDS)
        self.abandon()

    def abandon(self) -> None:
        """Closes the descriptors without ending anything: for a forked child of the trainer."""
        self.ended = True
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        self.lease.close()
        self.cells.close()


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


AnyHandle = TypeVar("AnyHandle", bound=Handle)


class Sandbox:
    """The zygote of one tier. Starting it takes about a second; a session then takes milliseconds."""

    def __init__(self, tier: isolation.Tier) -> None:
        self.tier = tier
        self.namespaces = tier.name in FULL_TIERS
        self.base = scratch(tier)
        self.root = os.geteuid() == 0
        self.uids = block_of_uids()
        self._next = 0
        self.control, self.process = launch(tier, self.base, self.uids[0], only_check=False)
        message = self._hear()
        if not message.get("ready"):
            self.close()
            raise SandboxError(f"the sandbox ({tier.name}) could not start: {message.get('why') or message}.")

    def _hear(self) -> dict[str, Any]:
        message: dict[str, Any] | None = {"checked": True}
        while message is not None and message.get("checked"):
            if not self.control.pending() and not poll([self.control], START_SECONDS):
                return {"why": f"no answer for {START_SECONDS:.0f} s"}
            message, _ = self.control.receive()
        return message or {"why": "it died"}

    def alive(self) -> bool:
        """Whether the zygote still runs."""
        return self.process.poll() is None

    def spawn(self, limits: Limits, kind: type[AnyHandle]) -> AnyHandle:
        """Asks for a session and returns at once; `Handle.wait_ready` waits for it."""
        self._next += 1
        uid = self.uids[self._next % len(self.uids)]
        handle = kind(self.namespaces)
        if not handle.send(self.control, session(self.tier, limits, uid)):
            handle.end()
            raise SandboxError(f"the sandbox ({self.tier.name}) has ended.")
        return handle

    def close(self) -> None:
        """Ends the zygote, and every session with it."""
        self.control.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("the sandbox (%s) takes more than %.0f s to end.", self.tier.name, END_SECONDS)
            if not self.namespaces:
                return  # it still waits for the reapers, and removes the folder
            self.process.kill()
            self.process.wait()
        if not self.namespaces:
            shutil.rmtree(self.base, ignore_errors=True)


def session(tier: isolation.Tier, limits: Limits, own_uid: int) -> dict[str, Any]:
    """What the zygote is told about one session, but its personality."""
    root, reduced = os.geteuid() == 0, tier.name not in FULL_TIERS
    uid = own_uid if root else None
    keep_read = root and reduced and not isolation.own_uid(uid or 0)
    if tier.name == "none" and keep_read:
        uid, keep_read = None, False  # an identity of its own could not even import
    return {
        "limits": limits.resources(),
        "others": _threads_of_user() + OTHERS if reduced and uid is None else 0,
        "disk": limits.disk,
        "uid": uid,
        "keep_read": keep_read,
        "trainer_pid": os.getpid(),
    }


def block_of_uids() -> range:
    """User ids that nobody has, not even the sessions of another trainer; in a container only low ones may exist."""
    try:
        with open("/proc/self/uid_map") as file:
            most = max(int(start) + int(count) for start, _, count in map(str.split, file))
    except OSError:
        most = 1 << 31
    low, high = (1 << 20, 1 << 31) if most >= 1 << 31 else (most // 3, most - 1)
    size = max(1, min(UIDS, (high - low) // 8))  # never fewer because it starts near the end
    start = random.SystemRandom().randrange(low, high - size + 1)
    return range(start, start + size)


def _threads_of_user() -> int:
    uid, count = os.geteuid(), 0
    if not os.path.isdir("/proc/self/task"):
        return 4096
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += os.stat(f"/proc/{name}/task").st_nlink - 2
        except OSError:
            continue
    return count


def scratch(tier: isolation.Tier) -> str:
    """A new folder for the scratch folders of a tier whose sessions have no tmpfs of their own."""
    return "/tmp/zygote" if tier.name in FULL_TIERS else tempfile.mkdtemp(prefix=f"llm-gym-sandbox-{os.getpid()}-")


def launch(tier: isolation.Tier, base: str, uid: int, *, only_check: bool) -> tuple[Channel, subprocess.Popen[bytes]]:
    """Starts the zygote in a new session with a clean environment; never forks the trainer's memory.

    `base` is a folder for the scratch folders of a reduced tier; `uid` is nobody's, for the session that is tried. The
    zygote is given the trainer's pidfd, so it ends with the trainer however that ends.
    """
    control, far = Channel.pair()
    command, environment = _command(tier, far.fileno())
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("LLM_GYM_SANDBOX_DEBUG") else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is the trainer's
        )
    finally:
        far.close()
    pidfds = [os.pidfd_open(os.getpid())] if hasattr(os, "pidfd_open") else []
    control.send(_spec(tier, base, uid, only_check), pidfds)
    for fd in pidfds:
        os.close(fd)
    return control, process


def _spec(tier: isolation.Tier, base: str, uid: int, only_check: bool) -> dict[str, Any]:
    mounted = tier.name in FULL_TIERS
    return {
        "house": {
            "namespaces": mounted,
            "user_namespaces": mounted and os.geteuid() != 0,
            "landlock": tier.name == "landlock",
            "seccomp": tier.name != "none",
            "path": [isolation.seen(path) if mounted else path for path in isolation.packages()],
            "readable": isolation.visible(),
            "hidden": isolation.hidden(),
            "base": base,
        },
        "probe": session(tier, Limits(), uid),
        "packages": list(WARMED),
        "only_check": only_check,
    }


def _command(tier: isolation.Tier, fd: int) -> tuple[list[str], dict[str, str]]:
    mounted, user = tier.name in FULL_TIERS, os.geteuid() != 0
    code = isolation.MOUNTED if mounted else str(isolation.GUEST.parent)
    python, *paths = (isolation.seen(p) if mounted else p for p in (isolation.interpreter(), *isolation.packages()))
    environment = {
        "PYTHONPATH": os.pathsep.join([code, *paths]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # else every thread of a kernel gets memory of its own
    }
    start = "from guest.zygote import main; main()"
    light = ["-S"] if mounted else []  # there the zygote itself is not warm: see guest/full.py
    zygote = [python, "-s", *light, "-c", start, str(fd)]
    if tier.name == "bubblewrap":
        settings = [word for name, value in environment.items() for word in ("--setenv", name, value)]
        return [*isolation.bubblewrap_arguments(user), *settings, "--", *zygote], {}
    if tier.name == "namespaces":
        inner = {"user": user, "mounts": isolation.mounts(), "command": zygote, "environment": environment}
        here = f"import sys; sys.path.insert(0, {str(isolation.GUEST.parent)!r}); from guest.outer import main; main()"
        return [isolation.interpreter(), "-I", "-S", "-c", here, json.dumps(inner)], {}
    return zygote, environment
