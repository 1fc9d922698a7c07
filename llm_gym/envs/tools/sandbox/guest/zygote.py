"""The sandbox's first process: it is told over one socket to start sessions.

Each request brings the descriptors that its session needs, the first of which is the session's
*lease*: closing it ends the session. The zygote ends with its socket, or with the trainer (whose
pidfd it is given first). How a session is started depends on the tier: see `full` and `reduced`.

In a full tier every session's first process is a copy of this one, so that what is imported here is
kept small: nothing but what `wire` and `syscalls` need.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

from .wire import Channel, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Starter(Protocol):
        """One way to start sessions."""

        watched: list[Any]
        """The zygote ends when one of these ends."""

        def start(self, request: bytes, fds: list[int]) -> tuple[int, int | None]:
            """Starts the session that a line of JSON asks for; the pid and pidfd of its reaper. May raise OSError."""

        def warm(self, packages: list[str]) -> int:
            """Imports everything that sessions need; the threads of the process that is forked, 0 if it died.

            What cannot be imported is an exception.
            """

        def end(self) -> None:
            """Cleans up what the kernel does not."""


def check(starter: Starter, request: dict[str, Any]) -> str:
    """Starts a session that ends at once; what went wrong, or nothing."""
    lease, far = Channel.pair()
    try:
        pid, pidfd = starter.start(json.dumps({**request, "personality": "nothing"}).encode(), [far.fileno()])
    except OSError as error:
        return str(error)
    finally:
        far.close()
    if pidfd is not None:
        os.close(pidfd)
    while (message := lease.receive()[0]) is not None:
        if "ready" in message or "error" in message:
            break
    lease.close()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return "the session died" if message is None else str(message.get("error", ""))


def serve(starter: Starter, control: Channel) -> None:
    """Starts sessions until the trainer is gone, or what the starter watches."""
    watched = [control, *starter.watched]
    while True:
        if not control.pending() and poll(watched, None) != [control]:
            return
        request, fds = control.receive_line(fds=16)
        if request is None:
            return
        lease = Channel(socket.socket(fileno=os.dup(fds[0])))
        try:
            pid, pidfd = starter.start(request, fds)
            lease.send({"pid": pid}, [] if pidfd is None else [pidfd])
            if pidfd is not None:
                os.close(pidfd)
        except OSError as error:
            lease.send({"error": str(error)})
        lease.close()
        for fd in fds:
            os.close(fd)


def main() -> None:
    """`zygote FD`: the control socket, over which the trainer first sends what `House` needs and its own pidfd."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    control.sock.set_inheritable(False)
    spec, trainer = control.receive(fds=1)
    if spec is None:
        return
    starter = make_starter(spec["house"], trainer)
    try:
        failed = check(starter, spec["probe"])
        control.send({"checked": not failed, "why": failed})
        if not failed and not spec["only_check"]:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            try:
                threads = starter.warm(spec["packages"])
            except Exception as error:
                control.send({"why": f"{type(error).__name__}: {error}"})
                threads = 0
            if threads:
                control.send({"ready": True, "threads": threads})
                serve(starter, control)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    finally:
        starter.end()
    os._exit(0)


def make_starter(house: dict[str, Any], trainer: list[int]) -> Starter:
    """The one that the tier needs; only this one's code is imported."""
    if house["namespaces"]:
        from .full import Full

        return Full(house, trainer)
    from .reduced import Reduced

    return Reduced(house, trainer)
