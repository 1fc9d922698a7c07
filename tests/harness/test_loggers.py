"""Loggers: real TensorBoard files read back; mistakes found at start; a failing one never ends a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops import group_learner
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.runs.loggers import LogConfig, Loggers, check
from llm_gym.harness.runs.run_folder import RunFolder

SMALL = ["eval.episodes=2", "prompts_per_step=1", "group_size=2", "sampling.max_tokens=4", "checkpoint.every=1"]


class Diary:
    """Keeps rows in a list; breaks at step 2."""

    kept: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self, run: Path, config: Mapping[str, Any], step: int, *, word: str = "plain") -> None:
        self.kept.append((word, (run.name, config.get("steps"), step)))

    def log(self, row: Mapping[str, Any]) -> None:
        if row["step"] == 2:
            raise ConnectionError("the server\nis gone")
        self.kept.append(("row", dict(row)))

    def close(self) -> None:
        self.kept.append(("closed", None))
        raise RuntimeError("and cannot be closed")


@pytest.fixture(autouse=True)
def _forget() -> None:
    Diary.kept.clear()


HERE = f"{__name__}:Diary"


class Notes(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_note(self, text: str) -> None:
        self.said.append(text)


def test_a_logger_that_fails_is_switched_off_and_the_run_goes_on(tmp_path: Path) -> None:
    notes = Notes()
    sets = [*SMALL, f"log.to=['{HERE}']", f"log.options={{'{HERE}': {{word: hello}}}}"]
    rows = Trainer(load(TrainConfig, sets=sets, steps=3), out=tmp_path / "run", observer=notes).train()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert Diary.kept[0] == ("hello", ("run", 3, 0))
    assert [word for word, _ in Diary.kept] == ["hello", "row", "row", "closed"]
    assert {k: v for k, v in Diary.kept[2][1].items() if v == v} == {k: v for k, v in rows[1].items() if v is not None}
    (said,) = [note for note in notes.said if "log.to" in note]
    assert "ConnectionError: the server\nis gone" in said
    assert "metrics.jsonl has every row" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["log.to=[tensorbord]"], "did you mean 'tensorboard'"),
        (["log.to=[no.such.module:fn]"], "cannot import 'no.such.module' of 'no.such.module:fn'"),
        (["log.options={wandb: {project: x}}"], "log.options: unknown value 'wandb'"),
        (["log.to=[wandb]"], r"'wandb' needs a package of that name; pip install 'llm-gym\[wandb\]'"),
    ],
)
def test_mistakes_are_found_before_the_model_loads(tmp_path: Path, monkeypatch, settings, said) -> None:
    monkeypatch.setattr(group_learner, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        Trainer(load(TrainConfig, sets=settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_logger_that_cannot_start_stops_the_run_and_closes_the_others(tmp_path: Path) -> None:
    config = LogConfig((HERE, "builtins:open"))
    check(config)
    with pytest.raises(ConfigError, match="'builtins:open' cannot start"):
        Loggers(lambda text: None).start(config, tmp_path, {}, 0)
    assert Diary.kept[-1] == ("closed", None)


def events(run: Path) -> Any:
    """TensorBoard's own reading of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sets = [*SMALL, "log.to=[tensorboard]", "eval.every=1"]
    rows = Trainer(load(TrainConfig, sets=sets, steps=2), out=tmp_path / "run").train()
    found = events(tmp_path / "run")
    for name in ("reward/mean", "policy/lr", "eval/sampled_reward", "time/step"):
        written = [(e.step, e.value) for e in found.Scalars(name)]
        logged = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if row.get(name) is not None]
        assert written == logged
        assert len(written) >= 2
    assert "sync/mode" not in found.Tags()["scalars"]


def test_after_a_resume_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def write(step: int, rows: range) -> None:
        loggers = Loggers(lambda text: pytest.fail(text))
        loggers.start(LogConfig(("tensorboard",)), tmp_path, {}, step)
        for at in rows:
            loggers.log({"step": at, "reward/mean": float(at + 10 * step), "nothing": math.nan, "word": "x"})
        loggers.close()

    write(0, range(5))  # killed here, its last checkpoint at step 2
    write(2, range(3, 6))
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("reward/mean")] == [(s, s + 20 * (s > 2)) for s in range(6)]
    assert found.Tags()["scalars"] == ["reward/mean"]


def test_the_settings_of_a_run_with_loggers_load_again(tmp_path: Path) -> None:
    config = load(TrainConfig, sets=["log.to=[wandb, trackio]", "log.options.wandb.project=sums"])
    folder = RunFolder(tmp_path / "run")
    from llm_gym.harness.settings import dump

    folder.start(dump(config))
    assert load(TrainConfig, folder.config_file) == config
    assert config.log == LogConfig(("wandb", "trackio"), {"wandb": {"project": "sums"}})
