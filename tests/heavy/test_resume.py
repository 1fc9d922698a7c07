"""A run killed with -9 at random moments and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.heavy

# Every run is a process of its own, forked from one that has imported everything: 20 starts in seconds.
processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _preload() -> None:
    processes.set_forkserver_preload(["llm_gym.harness.loops.trainer", "llm_gym.cli.train", "llm_gym.envs.arithmetic"])


def train(out: Path, steps: int) -> None:
    """`llmgym train --resume`, in the child; its own output is not wanted."""
    from click.testing import CliRunner

    from llm_gym.cli.train import command

    settings = ["prompts_per_step=4", "group_size=4", "eval.episodes=16", "eval.every=8", "checkpoint.every=2"]
    sets = [word for s in settings for word in ("--set", s)]
    again = ["--resume"] if out.exists() else []
    done = CliRunner().invoke(command, ["--steps", str(steps), "--seed", "3", "--out", str(out), *again, *sets])
    if done.exception is not None:
        raise done.exception


def start(out: Path, steps: int) -> BaseProcess:
    process = processes.Process(target=train, args=(out, steps))
    process.start()
    return process


def count(out: Path) -> int:
    """Rows written so far."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for_rows(out: Path, process: BaseProcess, wanted: int) -> None:
    """Waits until the run has written so many rows (it first forgets those after its checkpoint)."""
    while count(out) < wanted and process.is_alive():
        process.join(timeout=0.005)


def rows(out: Path) -> list[dict[str, object]]:
    """metrics.jsonl without timings."""
    timed = ("time/", "tokens_per_second/")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


@pytest.mark.parametrize(("kills", "steps"), [(4, 16), pytest.param(20, 80, marks=pytest.mark.soak)])
def test_kills_change_nothing(kills: int, steps: int, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start(whole, steps)
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    moments = random.Random(0)
    for number in range(kills):
        run = start(broken, steps)
        wait_for_rows(broken, run, count(broken) + moments.randrange(4) * (number > 2))
        run.join(timeout=moments.uniform(0, 0.2 if number > 2 else 1.5))
        assert run.is_alive(), "the run was over before it could be killed"
        run.kill()
        run.join()
    last = start(broken, steps)
    last.join()
    assert last.exitcode == 0
    assert [row["step"] for row in rows(broken)] == list(range(steps + 1))
    assert rows(broken) == rows(whole)
    checkpoint = Path("checkpoints") / f"step_{steps:06d}" / "model.safetensors"
    ours, theirs = load_file(whole / checkpoint), load_file(broken / checkpoint)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    episodes = [sorted(p.name for p in (run / "episodes").iterdir()) for run in (whole, broken)]
    assert episodes[0] == episodes[1]
