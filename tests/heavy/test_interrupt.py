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
    "saving": [*SMALL, "steps=1"],
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


def shared_memory(pids: set[int]) -> set[str]:
    """Files in /dev/shm that these processes have open or mapped, or that carry their number."""
    found = {str(file) for file in Path("/dev/shm").iterdir() for pid in pids if f"-{pid}" in file.name}
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps")
        if maps.exists():
            found |= {line.split()[-1] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return found


def family(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The process, everything that descends from it, and everything else in its session."""
    found = {process.pid: psutil.Process(process.pid)}
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid:
                found[other.pid] = other
        except (ProcessLookupError, PermissionError):
            continue
    for child in found[process.pid].children(recursive=True):
        found[child.pid] = child
    return found


@pytest.mark.parametrize("said", PHASES)
def test_ctrl_c(said: str, tmp_path: Path, start: list[subprocess.Popen[str]]) -> None:
    out = tmp_path / "run"
    sets = ["steps=3", "policy.vllm.max_model_len=256", *PHASES[said]]
    words = [word for each in sets for word in ("--set", each)]
    command = [sys.executable, "-m", "llm_gym.cli", "train", "--policy", "vllm", "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
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
    _, rest = run.communicate(timeout=120)
    assert run.returncode == 130, rest[-3000:]
    assert f"Go on from its newest checkpoint: llmgym train --resume --out {out}" in rest
    assert "Traceback" not in rest
    assert not [p for p in members.values() if p.pid != run.pid and p.is_running()]
    assert not [p for p in psutil.process_iter(["pid"]) if _session(p.pid) == run.pid]
    assert not [file for file in memory | shared_memory({run.pid}) if Path(file).exists()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None
