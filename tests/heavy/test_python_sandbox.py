"""Hundreds of episodes in a row, and the sandbox's tests as an ordinary user."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import ordinary_user
import psutil
import pytest
from sandbox_tiers import BACKENDS, descriptors, family, nothing_left, processes, scratch, within

from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import PythonSession

pytestmark = pytest.mark.heavy
ENVS = Path(__file__).parents[1] / "envs"
EPISODES = [200, pytest.param(int(os.environ.get("LLM_GYM_SANDBOX_EPISODES", "500")), marks=pytest.mark.soak)]


@pytest.mark.timeout(10_000)
@pytest.mark.parametrize("episodes", EPISODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hundreds_of_episodes_grow_nothing(backend: str, episodes: int) -> None:
    """Set LLM_GYM_SANDBOX_EPISODES=10000 for the longest form."""

    def episode(number: int) -> None:
        with PythonSession(backend) as session:
            assert session.run(f"import os; os.mkdir('d'); x = {number}; x + 1").output == f"{number + 1}\n"
            if number % 10 == 0:
                session.run("import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)")
            if number % 50 == 0:
                assert session.run("os._exit(1)").status == "died"

    with nothing_left():
        for number in range(50):
            episode(number)
        zygote = family(sandbox.tier().name)
        gc.collect()
        before = (_memory(psutil.Process()), sum(map(_memory, zygote)), descriptors(), len(scratch()))
        settled = len(processes())
        for number in range(episodes):
            episode(number)
        gc.collect()
        after = (_memory(psutil.Process()), sum(map(_memory, zygote)), descriptors(), len(scratch()))
        print(f"{episodes} episodes ({backend}): trainer, zygote, descriptors, folders: {before} -> {after}")
        assert after[0] - before[0] < episodes << 14
        assert after[1] - before[1] < episodes << 14
        assert after[2:] <= before[2:]
        assert within(60, lambda: len(processes()) <= settled)


def _memory(process: psutil.Process) -> int:
    """Its own; pages of files come and go with what else the machine does."""
    info = process.memory_info()
    return int(info.rss - info.shared)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("names", "marked"),
    [
        pytest.param(("", "_cases", "_provisioner", "_secrets"), "not soak", id="what the user decides"),
        pytest.param(("*",), "soak or not soak", id="all of it", marks=pytest.mark.soak),
    ],
)
def test_it_works_as_an_ordinary_user(names: tuple[str, ...], marked: str) -> None:
    """How a sandbox is made depends on the user; what runs in it then does not, and is run as one in `make soak`."""
    if os.geteuid() != 0:
        return  # then tests/envs has just done this
    tests = [str(file) for name in names for file in sorted(ENVS.glob(f"test_sandbox{name}.py"))]
    assert len(tests) >= len(names)
    result = ordinary_user.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marked, *tests],
        **{name: os.environ[name] for name in ("PATH", "LLM_GYM_SHARED") if name in os.environ},
    )
    print(result.stdout[-5000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
