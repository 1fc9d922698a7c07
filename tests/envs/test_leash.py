"""The leash of a server whose trainer dies at a bad moment; tests/heavy has whole trainers and servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_gym.envs.tools import leash

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a leash holds all of a family on Linux")

SLOWLY = """
import ctypes, os, platform, subprocess, sys, threading, time
leash, folder = sys.argv[1:]
command = [sys.executable, "-I", "-S", leash, str(os.getpid()), "PATH", folder, "sh", "-c", "echo begun; exec sleep 1000"]
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
        [sys.executable, "-c", SLOWLY, leash.__file__, str(folder)], stdout=subprocess.PIPE, text=True
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
    leashed = [sys.executable, "-I", "-S", leash.__file__, str(gone.pid), "PATH", str(folder), *command]
    assert subprocess.run(leashed, stdin=subprocess.DEVNULL, check=False, timeout=60).returncode == 1
    assert not list(tmp_path.iterdir())


def _ended(pidfd: int) -> bool:
    from llm_gym.envs.tools.sandbox.inside.wire import poll

    try:
        return bool(poll([pidfd], 60))
    finally:
        os.close(pidfd)
