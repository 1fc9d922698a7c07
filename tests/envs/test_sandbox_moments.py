"""Sessions that are interrupted, ended or forgotten at the worst moment."""

from __future__ import annotations

import contextlib
import gc
import io
import random
import socket
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from sandbox_tiers import BACKENDS, TIERS, nothing_left, sleeper, sleepers, within

from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import Limits, PythonSession, kernels, pool
from llm_gym.envs.tools.sandbox import sandbox as trainers_side
from llm_gym.envs.tools.sandbox.guest.wire import poll
from llm_gym.envs.tools.sandbox.kernels import KernelHandle
from llm_gym.envs.tools.sandbox.sandbox import Handle, SandboxError
from llm_gym.envs.tools.sandbox.session import WorkerCell


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def _end() -> object:
    yield
    sandbox.shutdown()


def reaper_of(handle: Handle | None) -> psutil.Process:
    assert handle is not None
    lines = Path(f"/proc/self/fdinfo/{handle.pidfd}").read_text().splitlines()
    return psutil.Process(next(int(line.split()[1]) for line in lines if line.startswith("Pid:")))


def resume(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have been killed meanwhile
        process.resume()


def test_an_interrupt_is_over_before_the_next_cell(tier: str) -> None:
    """However late the reaper relays it, and though the late cell has ended by itself."""
    with PythonSession("worker", tier) as session:
        reaper = reaper_of(session.held.handle)
        reaper.suspend()
        resuming = threading.Timer(5.0, resume, [reaper])
        resuming.start()
        assert session.run("import time; time.sleep(3)", timeout=0.3).status == "timeout"
        assert session.run("time.sleep(1.5); 1").output == "1\n"
        resuming.join()


def test_an_interrupt_that_is_not_relayed_costs_the_session_its_state(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers_side, "RELAY_SECONDS", 0.1)
    with PythonSession("worker", tier) as session:
        reaper = reaper_of(session.held.handle)
        reaper.suspend()
        resuming = threading.Timer(1.0, resume, [reaper])
        resuming.start()
        result = session.run("import time; time.sleep(60)", timeout=0.1)
        assert (result.status, result.lost) == ("timeout", True)
        assert session.run("1").output == "1\n"
        resuming.join()


LAST_MOMENT = """
import signal
real, kept = signal.signal, 1
def ending(number, handler):
    if handler is signal.SIG_IGN:
        signal.signal = real
        signal.raise_signal(number)
    return real(number, handler)
signal.signal = ending
"""


def test_an_interrupt_in_the_last_moment_of_a_cell_costs_nothing(tier: str, backend: str) -> None:
    with PythonSession(backend, tier) as session:
        assert session.run(LAST_MOMENT).status in ("ok", "error")
        assert session.held.handle is not None
        assert session.held.handle.interrupt()  # and what waits is deaf to it again
        assert session.run("kept").output == "1\n"


def test_who_waits_too_short_for_an_end_does_not_prevent_it(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a thousand processes have to be killed on a busy machine."""
    with nothing_left():
        session = PythonSession("worker", tier)
        session.run(sleeper())
        reaper = reaper_of(session.held.handle)
        reaper.suspend()
        with monkeypatch.context() as patched:
            patched.setattr(trainers_side, "END_SECONDS", 0.1)
            session.close()
        resume(reaper)
        assert within(60, lambda: not sleepers())


def test_a_session_ends_though_nobody_hears_that_it_has_begun(tier: str) -> None:
    """As when the trainer is killed in that moment: to tell it then raises in the reaper."""
    with nothing_left():
        PythonSession("worker", tier).close()
        handles = [pool.SANDBOXES[tier].spawn(Limits(), Handle) for _ in range(5)]
        for handle in handles:
            handle.lease.sock.shutdown(socket.SHUT_RD)
            (cell := WorkerCell()).start(handle, sleeper(), None)
            cell.close()
        for handle in handles:
            assert poll([handle.cells], 60)  # it has answered, or is gone
            handle.abandon()
        assert within(60, lambda: not sleepers())


def test_a_kernel_that_dies_before_its_first_word_is_replaced(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, died = KernelHandle.connect, []

    def connecting(handle: KernelHandle) -> None:
        connect(handle)
        if not died:
            died.append(handle)
            reaper_of(handle).kill()
            assert poll([handle.lease], 60)  # it is dead

    with nothing_left():
        monkeypatch.setattr(KernelHandle, "connect", connecting)
        with PythonSession("jupyter", tier) as session:
            assert session.run("6 * 7").output == "42\n"
        (handle,) = died
        assert handle.ended

        monkeypatch.setattr(KernelHandle, "wait_ready", _refuse)
        with pytest.raises(SandboxError, match="before their first cell"):
            PythonSession("jupyter", tier)


def _refuse(handle: KernelHandle, seconds: float = 0) -> None:
    raise ConnectionError


def test_the_thread_that_connects_may_collect_a_forgotten_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Collecting(list[Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            gc.collect()  # as any allocation may

    monkeypatch.setattr(kernels, "CONTEXTS", Collecting())
    forgotten: Any = PythonSession("jupyter")
    handle, forgotten.itself = forgotten.held.handle, forgotten
    del forgotten
    outputs: list[str] = []

    def play() -> None:
        with PythonSession("jupyter") as session:
            outputs.append(session.run("6 * 7").output)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    thread.join(60)
    assert outputs == ["42\n"]
    assert handle.ended


def test_a_flood_that_nobody_reads_in_time_does_not_cost_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a kernel sends more than the trainer reads, the last is lost, and with it that the cell has ended."""
    read, waiting = KernelHandle.read, [True]

    def reading(handle: KernelHandle, seconds: float, which: str = "iopub") -> Any:
        if waiting and handle.shell is not None and handle.shell.poll(60_000):  # the cell is over
            waiting.clear()
        return read(handle, seconds, which)

    with PythonSession("jupyter") as session:
        session.run("from IPython.display import display; kept = 1")
        monkeypatch.setattr(KernelHandle, "read", reading)
        result = session.run("for i in range(4000): display(i)", timeout=120)
        assert (result.status, result.lost, result.output[:4]) == ("ok", False, "0\n1\n")
        assert session.run("kept").output == "1\n"


SLOW = """
import subprocess, sys, time
kind, passed = type(sys.stdout), type(sys.stdout)._pass_on
def slow(self, data):
    time.sleep(1.5 if b"late" in data else 0)
    passed(self, data)
kind._pass_on = slow
"""


def test_what_a_child_wrote_is_its_cells_however_late_it_is_read(tier: str) -> None:
    """The thread that reads it stands still for longer than the cell would wait for nothing."""
    with PythonSession("jupyter", tier) as session:
        session.run(SLOW)
        assert session.run("assert not subprocess.call(['echo', 'late'])", timeout=60).output == "late\n"
        assert session.run("1").output == "1\n"


@pytest.mark.parametrize("ids", ["0 0 65536", "0 0 4294967295"])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_block_of_user_ids_is_never_short(ids: str, at_the_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions at a time must not be the same user: who ends one kills the processes of its user."""
    monkeypatch.setattr(trainers_side, "open", lambda _: io.StringIO(ids + "\n"), raising=False)
    monkeypatch.setattr(random.SystemRandom, "randrange", lambda _, low, high: high - 1 if at_the_end else low)
    block = trainers_side.block_of_uids()
    assert len(block) >= 5000
    assert 1000 < block[0] < block[-1] < int(ids.split()[2])
