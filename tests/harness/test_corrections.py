"""Importance corrections: exactly nothing on-policy, each mismatch counted once, bounds as published."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import gradients, qwen3, samples

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.importance_sampling import (
    CORRECTIONS,
    CorrectionConfig,
    importance_weights,
    mask,
    truncate,
)
from llm_gym.harness.algorithms.losses import LOSSES, LossConfig
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.types import Batch

DOUBLE = torch.float64
EVERY = [CorrectionConfig(name, level) for name in CORRECTIONS for level in ("token", "sequence")]  # type: ignore[arg-type]
POLICY_LOSSES = [name for name in LOSSES if not LossConfig(name).needs_every_sequence]


def test_bounds() -> None:
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0])
    assert truncate(ratio, 0.5, 2.0).tolist() == pytest.approx([0.1, 0.5, 1, 2, 2])
    assert mask(ratio, 0.5, 2.0).tolist() == pytest.approx([0, 0.5, 1, 2, 0])
    assert mask(ratio, 0.5, 5.0).tolist() == pytest.approx([0, 0.5, 1, 2, 0])


def test_closed_forms_by_token_and_by_sequence() -> None:
    """Token ratios 3, 1/2 and 1/4, 1: products 3/2 and 1/4."""
    proximal = torch.tensor([3.0, 0.5, 0.25, 1.0], dtype=DOUBLE).log()
    sampler, sequence = torch.zeros(4, dtype=DOUBLE), torch.tensor([0, 0, 1, 1])
    want = {
        ("tis", "token"): [2, 0.5, 0.25, 1],
        ("mis", "token"): [0, 0.5, 0, 1],
        ("tis", "sequence"): [1.5, 1.5, 0.25, 0.25],
        ("mis", "sequence"): [1.5, 1.5, 0, 0],
    }
    for (name, level), weights in want.items():
        got, streams = importance_weights(proximal, sampler, sequence, CorrectionConfig(name, level))  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.tensor(weights, dtype=DOUBLE))
        raw = [3, 0.5, 0.25, 1] if level == "token" else [1.5, 1.5, 0.25, 0.25]
        assert streams["sampler/weight_cut_fraction"].tolist() == [a != b for a, b in zip(weights, raw, strict=True)]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"loss\.correction\.name: unknown value 'tsi'; did you mean 'tis'"):
        CorrectionConfig("tsi")
    with pytest.raises(ConfigError, match=r"loss\.correction\.level: unknown value 'row'"):
        CorrectionConfig("tis", "row")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"loss\.correction\.high: got 0\.9, want at least 1"):
        CorrectionConfig("tis", high=0.9)


# In the learner


def gradient(learner: Learner, batch: Batch) -> dict[str, torch.Tensor]:
    for micro in batch.micro:
        learner.backward(micro, 1.0)
    found = gradients(learner.model)
    learner.model.zero_grad(set_to_none=True)
    return found


def sampled_by(learner: Learner, batch: Batch) -> Batch:
    """The batch as if this learner had sampled it, to the last bit."""
    known = [learner.logprobs(m)[0] for m in batch.micro]
    return replace(batch, micro=tuple(m.having(old_logprobs=k) for m, k in zip(batch.micro, known, strict=True)))


@pytest.mark.parametrize("correction", EVERY, ids=lambda c: f"{c.name}-{c.level}")
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_corrected_and_plain_agree_exactly(name: str, correction: CorrectionConfig) -> None:
    """Bit for bit: every weight is 1, and the ratio is 1 against either policy."""
    model = qwen3()
    loss = LossConfig(name=name, kl="k2", kl_weight=0.1, entropy_weight=0.01)
    plain = Learner(model, loss=loss)
    batch = sampled_by(plain, pack(samples([12, 7, 15]), max_tokens=20))
    corrected = Learner(model, loss=replace(loss, correction=correction))
    corrected.reference = plain.reference
    want, got = gradient(plain, batch), gradient(corrected, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert corrected.step(batch)["sampler/weight_mean"] == 1


@pytest.mark.parametrize("name", ["ppo_clip", "cispo"])
@pytest.mark.parametrize("correction", [c for c in EVERY if c.level == "token"], ids=lambda c: c.name)
def test_a_mismatch_inside_every_bound_is_counted_once(name: str, correction: CorrectionConfig) -> None:
    """The whole weight of a token is current / sampler: not its square (ratio and weight against the sampler)."""
    model = qwen3(dtype=DOUBLE)
    loss = LossConfig(name=name, clip_low=0.9, clip_high=9.0)
    plain = Learner(model, loss=loss)
    batch = sampled_by(plain, pack(samples([12, 7, 15]), max_tokens=20))
    off = 0.3 * torch.sin(torch.arange(100.0, dtype=DOUBLE))
    batch = replace(
        batch, micro=tuple(m.having(old_logprobs=m.streams["old_logprobs"] - off[: m.trained]) for m in batch.micro)
    )
    corrected = Learner(model, loss=replace(loss, correction=correction))
    want, got = gradient(plain, batch), gradient(corrected, batch)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12)


def drifted(correction: CorrectionConfig) -> tuple[Learner, Batch]:
    """A learner two updates away from where the batch was remembered; the engine was off from the start."""
    learner = Learner(qwen3(dtype=DOUBLE), OptimizerConfig(lr=3e-3), LossConfig(correction=correction), total_steps=9)
    batch = learner.compute_proximal_logprobs(pack(samples([12, 7, 15]), max_tokens=20))
    for _ in range(2):
        learner.step(batch)
    return learner, batch


def test_with_several_updates_the_clip_is_about_the_learner_and_the_weight_about_the_engine() -> None:
    """Ratio = current / remembered, weight = remembered / sampler; the weight stays as it was before the updates."""
    learner, batch = drifted(CorrectionConfig("tis", high=1.5))
    (micro, *_), config = batch.micro, learner.loss.correction
    assert "proximal" in micro.streams
    new = learner.logprobs(micro)[0]
    assert (new - micro.streams["proximal"]).abs().max() > 1e-3
    old, weight, _ = learner.anchor(micro.streams, new, micro.streams["old_logprobs"].double())
    assert torch.equal(old, micro.streams["proximal"])
    raw = torch.exp(micro.streams["proximal"] - micro.streams["old_logprobs"].double())
    torch.testing.assert_close(weight, raw.clamp(max=config.high))


def test_remembering_changes_nothing_but_the_proximal_log_probabilities() -> None:
    learner = Learner(qwen3())
    before: Any = copy.deepcopy(learner.model.state_dict())
    batch = pack(samples([12, 7, 15]), max_tokens=20)
    known = learner.compute_proximal_logprobs(batch)
    assert all(torch.equal(t, before[n]) for n, t in learner.model.state_dict().items())
    for micro, plain in zip(known.micro, batch.micro, strict=True):
        assert torch.equal(micro.streams["proximal"], learner.logprobs(plain)[0])  # type: ignore[arg-type]
        assert torch.equal(micro.tokens, plain.tokens)
