"""The leash of a server whose trainer dies at a bad moment; tests/heavy has whole trainers and servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_gym.envs.tools.mcp import supervisor

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a leash holds all of a family on Linux")

SLOWLY = """
import ctypes, os, platform, subprocess, sys, threading, time
leash, folder = sys.argv[1:]
command = [sys.executable, "-I", "-S", leash, str(os.getpid()), "PATH", folder, "9", "sh", "-c", "echo begun; exec sleep 1000"]
server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
server.stdout.readline()
def last():
    time.sleep(1)
    os._exit(0)
threading.Thread(target=last).start()
print(server.pid, flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # ends this thread alone
"""


def test_a_trainer_that_dies_slowly_leaves_no_folder(tmp_path: Path) -> None:
    """Its main thread has ended, which wakes the leash, and another lives on, as on a busy machine for a while."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    trainer = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, supervisor.__file__, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    pidfd = os.pidfd_open(int(trainer.stdout.readline()))
    trainer.communicate()
    assert _ended(pidfd)
    assert not folder.exists()


def test_a_trainer_that_died_before_its_server_started_leaves_no_folder(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = tmp_path / "scratch"
    folder.mkdir()
    command = ["touch", str(tmp_path / "started")]
    leashed = [sys.executable, "-I", "-S", supervisor.__file__, str(gone.pid), "PATH", str(folder), "9", *command]
    assert subprocess.run(leashed, stdin=subprocess.DEVNULL, check=False, timeout=60).returncode == 1
    assert not list(tmp_path.iterdir())


def leashed(code: str, longest: int) -> subprocess.CompletedProcess[bytes]:
    """A server of a few lines on a leash of ours, until it ends."""
    command = [sys.executable, "-I", "-S", "-c", f"import os, sys, time\n{code}"]
    leash_of = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), "PATH", "", str(longest), *command]
    with subprocess.Popen(leash_of, stdin=-1, stdout=-1, stderr=-1) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        out, err = server.stdout.read(), server.stderr.read()  # its input stays open meanwhile
    return subprocess.CompletedProcess(leash_of, server.returncode, out, err)


def test_what_a_server_says_is_passed_on_to_its_last_byte() -> None:
    said = leashed("sys.stdout.write('ab\\n' * 300_000 + 'end')", longest=3)
    assert (said.stdout, said.stderr) == (b"ab\n" * 300_000 + b"end", b"")


def test_a_server_that_writes_too_long_a_line_is_ended() -> None:
    """The line does not reach the trainer as a whole."""
    said = leashed("print('a'); sys.stdout.write('x' * (9 << 20))", 4 << 20)
    assert said.stdout.startswith(b"a\nxxx")
    assert len(said.stdout) <= len("a\n") + (4 << 20)
    assert said.stderr == b"it sent a message of more than 4 MiB\n"


def test_a_server_that_says_nothing_more_is_ended() -> None:
    assert leashed("os.close(1); time.sleep(1000)", 9).stdout == b""


def _ended(pidfd: int) -> bool:
    from llm_gym.envs.tools.sandbox.guest.wire import poll

    try:
        return bool(poll([pidfd], 60))
    finally:
        os.close(pidfd)
