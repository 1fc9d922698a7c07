"""Starts a server so that it and everything it starts end with us.

    python -I -S supervisor.py TRAINER NAMES FOLDER LONGEST COMMAND ...

The leash stands between the trainer and a server that speaks on its standard input and output. It gives the server
an environment of exactly the variables listed in NAMES (separated by commas), adopts whatever loses its parent
(Linux: a sub-reaper), and when the trainer closes the input, ends or dies, kills every descendant, those that made
sessions of their own included. If the trainer (TRAINER is its pid) died, even before the server was started, it also
removes FOLDER, which nobody else will. What the server says is passed on; one that writes a line of more than LONGEST
bytes is ended, because the trainer would read it in a loop that others share. Only the standard library, and little of
it: it starts in a few milliseconds.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 0.2
"""Seconds in which a server may end by itself once its input is closed."""
PATIENCE = 2.0
"""Seconds in which everything must be dead after it was killed."""
DYING = 60.0
"""Seconds in which a trainer that is dying must be dead."""
SIGKILL_PENDING, PF_EXITING = 1 << (signal.SIGKILL - 1), 4
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Runs the server until it ends or is to end; returns its exit code."""
    trainer, names, folder, longest, *command = sys.argv[1:]
    parent = int(trainer)  # not getppid(), which may already be another
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        _remove(folder)
        return 1
    environment = {name: os.environ[name] for name in names.split(",") if name in os.environ}
    try:
        server = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    try:
        _watch(server, Output(server, int(longest)), wake, parent)
    finally:
        _kill_all(server)
    if _orphaned(parent):
        _remove(folder)
    return server.returncode if server.returncode is not None and server.returncode >= 0 else 1


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _orphaned(parent: int) -> bool:
    """Whether the trainer died. It gets a moment, and if it is dying, all the time that its threads need for that."""
    deadline, moments = time.monotonic() + DYING, 20
    while moments and os.getppid() == parent and time.monotonic() < deadline:
        moments -= not _dying(parent)
        time.sleep(0.005)
    return os.getppid() != parent


def _dying(pid: int) -> bool:
    """Whether a process is on its way out: killed, or with a main thread that has ended or is ending."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat, open(f"/proc/{pid}/status", "rb") as status:
            state, _, _, _, _, _, flags = stat.read().rpartition(b")")[2].split()[:7]
            pending = next(line.split()[1] for line in status if line.startswith(b"SigPnd:"))
    except OSError:
        return False
    return state in b"ZX" or bool(int(flags) & PF_EXITING or int(pending, 16) & SIGKILL_PENDING)


class Output:
    """What the server writes, on its way to the trainer; neither side can make us wait for it."""

    def __init__(self, server: "subprocess.Popen[bytes]", longest: int) -> None:
        assert server.stdout is not None
        self.source, self._longest = server.stdout.fileno(), longest
        self._line, self._waiting = 0, b""
        for descriptor in (self.source, 1):
            os.set_blocking(descriptor, False)

    def wait_for(self) -> "tuple[int, int]":
        """Descriptor and event to wait for: that the trainer takes what is waiting, else that the server says more."""
        return (1, select.POLLOUT) if self._waiting else (self.source, select.POLLIN)

    def move(self) -> bool:
        """Moves what can be moved; whether there may be more to come."""
        if not self._waiting:
            try:
                self._waiting = os.read(self.source, 1 << 16)
            except BlockingIOError:
                return True
            if not self._waiting or self._too_long(self._waiting):
                return False
        try:
            self._waiting = self._waiting[os.write(1, self._waiting) :]
        except BlockingIOError:
            pass
        except OSError:  # the trainer reads no more
            return False
        return True

    def flush(self) -> None:
        """Moves what the server left when it ended, as far as the trainer takes it in time."""
        deadline = time.monotonic() + PATIENCE
        poll = select.poll()
        while (left := deadline - time.monotonic()) > 0:
            descriptor, event = self.wait_for()
            poll.register(descriptor, event)
            ready = poll.poll(1000 * left if self._waiting else 0)
            poll.unregister(descriptor)
            if not ready or not self.move():
                return

    def _too_long(self, data: bytes) -> bool:
        """Whether the line that is being written has become too long, `data` included."""
        first, last = data.find(b"\n"), data.rfind(b"\n")
        longest = self._line + (first if first >= 0 else len(data))
        self._line = len(data) - last - 1 if last >= 0 else longest
        if longest > self._longest:
            print(f"it sent a message of more than {self._longest >> 20} MiB", file=sys.stderr, flush=True)
        return longest > self._longest


def _watch(server: "subprocess.Popen[bytes]", output: Output, wake: int, parent: int) -> None:
    """Passes on what the server writes until it has ended, or has had its grace after the trainer let go."""
    poll = select.poll()
    poll.register(0, 0)  # nothing but the other end's closing
    poll.register(wake, select.POLLIN)
    while server.poll() is None and os.getppid() == parent:
        awaited, event = output.wait_for()
        poll.register(awaited, event)
        ready = poll.poll(1000)
        poll.unregister(awaited)
        for descriptor, _ in ready:
            if descriptor == wake:
                if set(os.read(wake, 64)) - {signal.SIGCHLD}:
                    return
            elif descriptor == 0 or not output.move():
                deadline = time.monotonic() + GRACE
                while server.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                return
    output.flush()


def _kill_all(server: "subprocess.Popen[bytes]") -> None:
    """Kills every descendant, again and again until there is none."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is None:
            _kill(-server.pid)  # its process group: all there is to go by without /proc
        alive = _descendants()
        for pid in alive:
            _kill(pid)
        try:
            while server.poll() is not None and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            if not alive:
                return
        if not alive and server.poll() is not None and not os.path.isdir("/proc/self"):
            return
        time.sleep(0.002)


def _descendants() -> "set[int]":
    """Every living process below this one."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    state, parent = stat.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    below = [os.getpid()]
    while below:
        new = children.get(below.pop(), [])
        found.update(new)
        below.extend(new)
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
