"""Presets: a row of defaults each, and for each one gradient whatever the layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_models import VOCABULARY, gradients, qwen3, row, saying
from torch import Tensor

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Turn
from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.advantages import advantage
from llm_gym.harness.algorithms.presets import PRESETS
from llm_gym.harness.algorithms.rewards import rewards_of
from llm_gym.harness.batching.packing import pack, samples
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.settings import dump, from_dict, load
from llm_gym.harness.types import Batch, TrainSequence
from llm_gym.trajectories import trajectories

WANTED = {
    "grpo": ("group_norm", "ppo_clip", 0.2, 0.2, "sequence"),
    "dr_grpo": ("dr_grpo", "ppo_clip", 0.2, 0.2, "constant"),
    "dapo": ("group_norm", "ppo_clip", 0.2, 0.28, "token_global"),
    "gspo": ("group_norm", "gspo", 3e-4, 4e-4, "sequence"),
    "gmpo": (
        "group_norm",
        "gmpo",
        pytest.approx(1 - np.exp(-0.4), abs=1e-4),
        pytest.approx(np.exp(0.4) - 1, abs=1e-4),
        "sequence",
    ),
    "cispo": ("group_norm", "cispo", 1.0, 4.0, "token_global"),
    "sapo": ("group_norm", "sapo", 0.2, 0.2, "sequence"),
    "rloo": ("rloo", "reinforce", 0.2, 0.2, "constant"),
    "reinforce_pp": ("reinforce_pp", "ppo_clip", 0.2, 0.2, "token_global"),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", "ppo_clip", 0.2, 0.2, "token_global"),
    "gdpo": ("gdpo", "ppo_clip", 0.2, 0.2, "sequence"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_row(name: str) -> None:
    config = load(TrainConfig, preset=name)
    loss = config.loss
    assert (config.advantage, loss.name, loss.clip_low, loss.clip_high, loss.normaliser) == WANTED[name]
    assert config.overlong == (0.2 if name == "dapo" else 0)
    assert config.optimizer == TrainConfig().optimizer


def test_file_and_set_win_over_the_preset_wherever_it_stands(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("loss: {clip_high: 0.3}\npreset: dapo\nadvantage: rloo\n")
    config = load(TrainConfig, file, ["loss.clip_low=0.1", "overlong=0.5"])
    assert (config.advantage, config.overlong, config.loss.clip_low, config.loss.clip_high) == ("rloo", 0.5, 0.1, 0.3)
    assert load(TrainConfig, file, ["preset=gspo"]).loss.name == "gspo"
    assert load(TrainConfig, file, preset="gspo").loss == dataclasses.replace(
        load(TrainConfig, preset="gspo").loss, clip_high=0.3
    )


def test_what_is_written_down_says_everything_without_the_preset() -> None:
    config = load(TrainConfig, sets=["preset=cispo"])
    assert "preset" not in yaml.safe_load(dump(config))
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))) == config


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="preset: unknown value 'gpso'; did you mean 'gspo'"):
        load(TrainConfig, preset="gpso")
    with pytest.raises(ConfigError, match="preset: unknown value 'gpso'; did you mean 'gspo'"):
        TrainConfig(preset="gpso")  # type: ignore[call-arg]


def test_a_preset_is_taken_in_python_too() -> None:
    assert TrainConfig(preset="gspo", steps=3) == load(TrainConfig, preset="gspo", steps=3)  # type: ignore[call-arg]


# One gradient


def step_of_groups(seed: int = 0) -> list[Group]:
    """Two groups of four episodes that share a prompt, 4 to 20 tokens each, two reward components."""
    rng = np.random.default_rng(seed)
    made = []
    for task, prompt_length in enumerate((9, 14)):
        prompt = rng.integers(0, VOCABULARY, prompt_length).astype(np.int32)
        episodes = []
        for member in range(4):
            said = row(int(rng.integers(4, 20)), int(rng.integers(1000)), prompt=0)
            completion = Completion(said.tokens, said.streams["old_logprobs"], "stop")
            parts = {"right": float(rng.integers(0, 2)), "style": float(rng.random())}
            turn = Turn(prompt, completion, sum(parts.values()))
            episodes.append(Episode("e", task, trajectories([turn]), StopReason.ANSWERED, parts, member=member))
        made.append(Group(Task(0, task), tuple(episodes)))
    return made


def near(rows: list[TrainSequence], model: Any) -> list[TrainSequence]:
    """The rows with a sampler that is near this model, so that some tokens are inside every clip and some not."""
    learner, made = Learner(model), []
    for i, s in enumerate(rows):
        (micro,) = pack([s], max_tokens=10**6).micro
        noise = 0.3 * np.random.default_rng(i).standard_normal(micro.trained)
        noise[noise > 0] *= i % 2  # half of the sequences lie below on average, half are mixed
        made.append(saying(s, (learner.logprobs(micro)[0].numpy() + noise).astype(np.float32)))
    return made


def prepared(name: str, model: Any) -> tuple[TrainConfig, list[TrainSequence]]:
    config = load(TrainConfig, preset=name, sets=["loss.constant_length=20"])
    groups = step_of_groups()
    credit = advantage(config.advantage)(rewards_of(groups, limit=20, overlong=config.overlong))
    return config, near(samples(groups, credit), model)


LAYOUTS: dict[str, Callable[..., Batch]] = {
    "1x8": lambda rows, **how: pack(rows, max_tokens=10**6, **how),
    "8x1": lambda rows, **how: pack(rows, max_tokens=1, **how),
    "packed": lambda rows, **how: pack(rows, max_tokens=50, **how),
    "shuffled": lambda rows, **how: pack([rows[i] for i in (3, 0, 7, 5, 1, 6, 2, 4)], max_tokens=60, **how),
    "prefix-shared": lambda rows, **how: pack(rows, max_tokens=70, share=True, **how),
    "both prompts shared": lambda rows, **how: pack(rows, max_tokens=10**6, share=True, **how),
}


FORMS = [(layout, "merge") for layout in LAYOUTS] + [("1x8", "padded"), ("1x8", "cat"), ("prefix-shared", "cat")]
"""Layouts and how attention is computed over them; `padded`: by transformers itself, a row for each sequence."""


def gradient(
    model: Any, batch: Batch, config: TrainConfig, reference: Any = None, form: str = "merge"
) -> dict[str, Tensor]:
    learner = Learner(model, loss=config.loss)
    learner.backbone.form, learner.backbone.packed = form, form != "padded"
    if form == "padded":
        model.set_attn_implementation("sdpa")
    learner.reference = reference or learner.reference
    for micro in batch.micro:
        learner.backward(micro, 1.0)
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("extra", [[], ["loss.correction.name=mis", "loss.correction.level=sequence"]], ids=["", "mis"])
@pytest.mark.parametrize("name", PRESETS)
def test_one_gradient_in_float64_whatever_the_layout(name: str, extra: list[str]) -> None:
    model = qwen3(dtype=torch.float64)
    config, rows = prepared(name, model)
    config = load(TrainConfig, preset=name, sets=["loss.constant_length=20", *extra])
    how = {"normaliser": config.loss.normaliser, "constant_length": config.loss.constant_length}
    whole = gradient(model, LAYOUTS["1x8"](rows, **how), config)
    assert LAYOUTS["prefix-shared"](rows, **how).micro[0].parents
    assert len(LAYOUTS["8x1"](rows, **how).micro) == 8
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4
    for layout, form in FORMS:
        got = gradient(model, LAYOUTS[layout](rows, **how), config, form=form)
        for tensor, want in whole.items():
            torch.testing.assert_close(got[tensor], want, rtol=1e-9, atol=1e-9, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("name", PRESETS)
def test_one_gradient_in_float32_too(name: str) -> None:
    """To 1e-6 of the gradient's own size: float32 sums in another order."""
    model = qwen3()
    config, rows = prepared(name, model)
    how = {"normaliser": config.loss.normaliser, "constant_length": config.loss.constant_length}
    whole = gradient(model, LAYOUTS["1x8"](rows, **how), config)
    scale = max(float(g.abs().max()) for g in whole.values())
    for layout, form in FORMS:
        got = gradient(model, LAYOUTS[layout](rows, **how), config, form=form)
        worst = max(float((got[t] - whole[t]).abs().max()) for t in whole)
        assert worst <= 1e-6 * max(1.0, scale), (layout, form, worst, scale)


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_the_reference_does_not_depend_on_the_layout_either(where: str) -> None:
    model = qwen3(dtype=torch.float64)
    _, rows = prepared("grpo", model)
    config = load(TrainConfig, preset="grpo", sets=["loss.kl=k1", "loss.kl_weight=0.1", f"loss.kl_in={where}"])
    reference = Learner(qwen3(seed=5, dtype=torch.float64)).backbone
    whole = gradient(model, LAYOUTS["1x8"](rows), config, reference)
    without = gradient(model, LAYOUTS["1x8"](rows), load(TrainConfig, preset="grpo"))
    assert max(float((whole[t] - without[t]).abs().max()) for t in whole) > 1e-3
    for layout in LAYOUTS.keys() - {"1x8"}:
        got = gradient(model, LAYOUTS[layout](rows), config, reference)
        for tensor, want in whole.items():
            torch.testing.assert_close(got[tensor], want, rtol=1e-9, atol=1e-9)
