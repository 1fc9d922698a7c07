"""A run killed with -9 at random moments and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.heavy
KILLS = 20
STEPS = 24


def command(out: Path, *more: str) -> list[str]:
    settings = ["prompts_per_step=4", "group_size=4", "eval.episodes=16", "eval.every=8", "checkpoint.every=2"]
    sets = [word for s in settings for word in ("--set", s)]
    run = [sys.executable, "-m", "llm_gym.cli", "train", "--steps", str(STEPS), "--seed", "3", "--out", str(out)]
    return [*run, *sets, *more]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command(out, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate()
    assert process.returncode == 0, said


def kill_somewhere(process: subprocess.Popen[str], moment: float) -> None:
    """SIGKILL `moment` seconds after the first word of the process, or when it ends by itself."""
    assert process.stdout is not None
    process.stdout.readline()
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def rows(out: Path) -> list[dict[str, object]]:
    """metrics.jsonl without timings."""
    timed = ("time/", "tokens_per_second/")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole))
    moments = random.Random(0)
    for _ in range(KILLS):
        kill_somewhere(start(broken, "--resume"), moments.uniform(0.0, 3.0))
    finish(start(broken, "--resume"))
    assert [row["step"] for row in rows(broken)] == list(range(STEPS + 1))
    assert rows(broken) == rows(whole)
    last = Path("checkpoints") / f"step_{STEPS:06d}" / "model.safetensors"
    ours, theirs = load_file(whole / last), load_file(broken / last)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    episodes = [sorted(p.name for p in (run / "episodes").iterdir()) for run in (whole, broken)]
    assert episodes[0] == episodes[1]
