"""Runs that teach nothing, or cannot go on, say so: in one sentence, on the console and in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_gym.core import Episode, StopReason
from llm_gym.errors import ConfigError, Diverged, SettingError, TrainingError
from llm_gym.harness.algorithms import losses
from llm_gym.harness.algorithms.streams import Streams
from llm_gym.harness.bounds import Within
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.learner.optimizers import OptimizerConfig, clip_gradients
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.runs import metrics, verdict
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.settings import load
from llm_gym.rollouts.driver import rollout

SMALL = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "sampling": {"max_tokens": 4}, "eval": {"episodes": 0}}


class Notes(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []

    def on_note(self, text: str) -> None:
        self.told.append(text)


def unshaped(streams: Streams, config: losses.LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -streams.logprobs.sum(), {}


def infinite(streams: Streams, config: losses.LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return streams.logprobs * (streams.advantages * torch.inf), {}


def test_a_run_whose_every_episode_fails_stops_after_a_step_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm_gym.envs.arithmetic as arithmetic

    trainer = Trainer(load(TrainConfig, **SMALL), out=tmp_path / "run")
    monkeypatch.setattr(arithmetic.Arithmetic, "open", lambda self: [][0])
    with pytest.raises(TrainingError, match=r"step 1: each of its 4 episodes failed.*env_error.*IndexError"):
        trainer.train()
    kept = (tmp_path / "run" / "episodes" / "failed_000001.jsonl").read_text().splitlines()
    assert [json.loads(line)["stop_reason"] for line in kept] == ["env_error"] * 4


def test_a_run_whose_every_completion_is_cut_is_warned_of_once_and_in_the_end(tmp_path: Path) -> None:
    notes = Notes()
    config = load(TrainConfig, **{**SMALL, "steps": 2, "sampling": {"max_tokens": 1}})
    rows = Trainer(config, out=tmp_path / "run", observer=notes).train()
    assert [row["episode/cut_fraction"] for row in rows if row["step"]] == [1.0, 1.0]
    assert [text for text in notes.told if "cut by length" in text] == [
        "Warning: step 1: " + verdict.alarms(rows[-1])["episode/cut_fraction"]
    ]
    assert any("100% of the episodes were cut" in text for text in verdict.warnings(rows))


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("tools/error_fraction", "calls of tools"),
        ("episode/reward_failed_fraction", "the reward failed"),
        ("episode/failed_fraction", "episodes failed"),
    ],
)
def test_what_shows_only_while_running_is_a_warning(metric: str, words: str) -> None:
    rows = [{"step": step, metric: 0.6} for step in (1, 2)]
    assert [words in text.lower() or words in text for text in verdict.warnings(rows)] == [True]
    assert verdict.warnings([{"step": 1, metric: 0.05}]) == []


def test_calls_that_are_answered_with_an_error_are_counted() -> None:
    def told(*results: str) -> Episode:
        messages = tuple({"role": "tool", "content": text} for text in results)
        return Episode("e", 0, (), StopReason.ANSWERED, {}, messages)

    row = metrics.describe([told("Error: ValueError: x", "4"), told("Error: no"), told("5")])
    assert row["tools/error_fraction"] == 0.5
    assert "tools/error_fraction" not in metrics.describe([told()])


def test_metrics_of_an_update_without_tokens_do_not_take_the_others_away() -> None:
    known = {"policy/lr": 1.0, "tokens/trained": 4.0, "sampler/logprob_gap_mean": 0.5, "policy/mine": 2.0}
    empty = {"policy/lr": 1.0, "tokens/trained": 0.0, "sampler/logprob_gap_mean": float("nan")}
    row = metrics.combine([empty, known, empty])
    assert (row["sampler/logprob_gap_mean"], row["policy/mine"], row["tokens/trained"]) == (0.5, 2.0, 4.0)


def test_a_gradient_that_is_not_finite_is_an_error_of_the_project_that_says_what_to_try() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, torch.nan])
    with pytest.raises(Diverged, match=r"optimizer\.lr"):
        clip_gradients([weight], 1.0)
    assert weight.tolist() == [1.0, 1.0]


def test_a_custom_loss_of_another_shape_never_trains() -> None:
    fn = losses.loss_function(f"{__name__}:unshaped")
    new = torch.zeros(3, requires_grad=True)
    with pytest.raises(
        ConfigError, match=r"loss\.name: .*test_runs_gone_wrong\.py, line \d+ gave .*\(\), want .*\[M\]"
    ):
        fn(
            Streams(new, new.detach(), torch.ones(3), torch.zeros(3, dtype=torch.int64), torch.ones(3)),
            losses.LossConfig(),
        )


def test_a_negative_number_of_checkpoints_to_keep_deletes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep: got -1, want at least 0"):
        load(TrainConfig, sets=["checkpoint.keep=-1"])
    run = RunFolder(tmp_path)
    run.start("steps: 4\n")
    for step in (1, 2, 3):
        run.save(step, lambda folder: None, keep=0)
    assert len(run.checkpoints()) == 3
    run.save(4, lambda folder: None, keep=2)
    assert [path.name for path in run.checkpoints()] == ["step_000003", "step_000004"]


def test_what_a_file_says_replaces_what_a_preset_says() -> None:
    assert load(TrainConfig, preset="dapo", filters={}).filters == {}
    assert load(TrainConfig, preset="dapo", filters={"distinct": 2}).filters == {"distinct": 2}
    assert load(TrainConfig, sets=["preset=dapo", "filters.distinct=2"]).filters == {"spread": 0, "distinct": 2}
    assert load(TrainConfig, preset="dapo", loss={"clip_low": 0.1}).loss.clip_high == 0.28


def test_layers_counted_from_the_end_are_text_though_yaml_reads_numbers() -> None:
    config = load(TrainConfig, sets=["memory.train_layers=-4", "lora.layers=-2"])
    assert config.memory.train_layers == "-4"
    assert config.lora is not None
    assert config.lora.layers == "-2"


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [1, -1, float("nan")]),
        ("(0, inf]", [1, float("inf")], [0]),
        ("[1, inf)", [1], [float("inf")]),
    ],
)
def test_bounds_are_intervals(interval: str, inside: list[float], outside: list[float]) -> None:
    assert [Within(interval).holds(value) for value in inside + outside] == [True] * len(inside) + [False] * len(
        outside
    )


@pytest.mark.parametrize("field", [{"betas": (2, 0.9)}, {"floor": 2}, {"lr": float("inf")}, {"eps": "small"}])
def test_settings_made_in_python_are_bounded_too(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.{min(field)}: got "):
        OptimizerConfig(**field)  # type: ignore[arg-type]


def test_an_environment_that_is_made_already_is_refused_with_what_to_pass() -> None:
    import gymnasium

    env = gymnasium.make("llm_gym/Arithmetic-v0")
    with pytest.raises(SettingError, match="made already.*pass its id"):
        rollout(env, None, seeds=[0])  # type: ignore[arg-type]
