"""The run folder survives what a kill leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llm_gym.core import Episode, StopReason
from llm_gym.errors import CheckpointError
from llm_gym.harness.checkpoint import RunFolder, step_of


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start("steps: 3\n")
    return folder


def fill(run: RunFolder, steps: int) -> None:
    for step in range(steps + 1):
        run.write_episodes(f"step_{step:06d}", [Episode("e", step, (), StopReason.ANSWERED)])
        run.log({"step": step, "reward/mean": step / 2})


def test_rewind_forgets_later_rows_and_episodes(run: RunFolder) -> None:
    fill(run, 5)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    (run.path / "episodes" / "step_000006.jsonl.partial").write_text("{")
    (run.path / "checkpoints" / ".partial-step_000006").mkdir()
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4, 5]
    run.rewind(2)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert sorted(p.name for p in (run.path / "episodes").iterdir()) == [f"step_{s:06d}.jsonl" for s in range(3)]
    assert not list((run.path / "checkpoints").iterdir())
    fill(run, 0)
    assert run.metrics_file.read_text().endswith("\n")


def test_a_checkpoint_appears_whole_or_not_at_all(run: RunFolder) -> None:
    run.save(1, lambda folder: (folder / "w").write_text("one") and None, keep=2)

    def dies(folder: Path) -> None:
        (folder / "w").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save(2, dies, keep=2)
    assert [step_of(c) for c in run.checkpoints()] == [1]
    run.save(2, lambda folder: (folder / "w").write_text("two") and None, keep=2)
    run.save(3, lambda folder: (folder / "w").write_text("three") and None, keep=2)
    assert [(step_of(c), (c / "w").read_text()) for c in run.checkpoints()] == [(2, "two"), (3, "three")]


def test_rows_are_json_even_when_numbers_are_not(run: RunFolder) -> None:
    run.log({"step": 0, "a": math.nan, "b": math.inf, "c": 0.1})
    assert json.loads(run.metrics_file.read_text()) == {"step": 0, "a": None, "b": None, "c": 0.1}


def test_a_folder_with_a_run_is_not_overwritten(run: RunFolder) -> None:
    run.start("steps: 3\n")  # nothing has happened here yet
    run.log({"step": 0})
    with pytest.raises(CheckpointError, match="--resume"):
        run.start("steps: 4\n")
    assert run.config_file.read_text() == "steps: 3\n"
