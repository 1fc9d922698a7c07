"""Ctrl-C in every phase of `llmgym train --policy vllm`: it says how to go on, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from leftovers import existing, living, session, shared_memory
from sandbox_tiers import within

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

ROOT = Path(__file__).parents[2]
LARGE = ["prompts_per_step=64", "group_size=16", "eval.episodes=0"]
SMALL = ["prompts_per_step=2", "group_size=4", "eval.episodes=0"]
PHASES = {
    "loading the embedded model": SMALL,
    "starting the engine": SMALL,
    "episodes of evaluation": ["eval.episodes=4096"],
    "episodes of training": LARGE,
    "training on them": LARGE,
    "sending the new weights": [*SMALL, "policy.sync=restart"],  # the mode that takes longest
    "saving": [*SMALL, "checkpoint.every=1"],  # over in a moment; the next step then
}
"""What the phase says when it begins -> settings with which it lasts."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to look after."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def environment(tmp: Path) -> dict[str, str]:
    """A command's, with a folder for temporary files of its own."""
    (tmp / "temporary").mkdir()
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp / "temporary")}


def stores(tmp: Path) -> list[str]:
    """Files by which the processes of an engine find each other."""
    return [file.name for file in (tmp / "temporary").iterdir() if file.name.startswith("vllm_dist_")]


def family(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The process, everything that descends from it, and everything else in its session."""
    own = psutil.Process(process.pid)
    return {member.pid: member for member in (own, *own.children(recursive=True), *session(process.pid))}


SOAK = ("starting the engine", "episodes of evaluation", "episodes of training", "training on them", "saving")
"""Phases beside others that CI interrupts."""


@pytest.mark.parametrize(
    "said", [pytest.param(phase, marks=[pytest.mark.soak] if phase in SOAK else []) for phase in PHASES]
)
def test_ctrl_c(said: str, tmp_path: Path, start: list[subprocess.Popen[str]]) -> None:
    out = tmp_path / "run"
    sets = ["steps=3", "policy.vllm.max_model_len=256", *PHASES[said]]
    words = [word for each in sets for word in ("--set", each)]
    command = [sys.executable, "-m", "llm_gym.cli", "train", "--policy", "vllm", "--out", str(out), *words]
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(tmp_path),
        start_new_session=True,
    )
    start.append(run)
    assert run.stderr is not None
    seen = []
    for line in run.stderr:
        seen.append(line)
        if said in line:
            break
    else:
        pytest.fail(f"the run ended before {said!r}: {''.join(seen)[-2000:]}")
    members = family(run)
    memory = shared_memory(set(members))
    os.killpg(run.pid, signal.SIGINT)
    _, rest = run.communicate(timeout=300)
    assert run.returncode == 130, rest[-3000:]
    assert f"Go on from its newest checkpoint: llmgym train --resume --out {out}" in rest
    assert "Traceback" not in rest
    assert within(60, lambda: not living(members.values())), living(members.values())
    assert within(60, lambda: not session(run.pid)), session(run.pid)
    assert within(60, lambda: not existing(memory | shared_memory({run.pid}))), existing(memory)
    assert stores(tmp_path) == []


# CI has Ctrl-C at that moment of a training.
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGTERM])
def test_a_measurement_that_is_stopped_leaves_nothing_behind(
    how: signal.Signals, tmp_path: Path, start: list[subprocess.Popen[str]]
) -> None:
    """A command that has nothing to say ends in the same way."""
    command = [sys.executable, "-m", "llm_gym.cli", "eval", "--policy", "vllm", "--episodes", "100000"]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment(tmp_path)
    )
    start.append(run)
    assert within(300, lambda: stores(tmp_path) or run.poll() is not None), "the engine does not start"
    run.send_signal(how)
    _, rest = run.communicate(timeout=300)
    assert run.returncode == 130, rest[-3000:]
    assert "Traceback" not in rest
    assert stores(tmp_path) == []
