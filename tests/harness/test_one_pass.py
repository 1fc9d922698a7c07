"""The learner's gradient formed in one pass: that of two passes and of full logits, for every loss that allows it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import gradients, qwen3, row, sample
from torch import Tensor

from llm_gym.harness.algorithms.importance_sampling import CORRECTIONS, CorrectionConfig
from llm_gym.harness.algorithms.losses import LOSSES, LossConfig, loss_function, token_level
from llm_gym.harness.algorithms.streams import Streams
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model import heads
from llm_gym.harness.model.heads import Sizes
from llm_gym.harness.model.loading import Backbone, LoraConfig, prepare
from llm_gym.harness.types import MicroBatch

DOUBLE = torch.float64
WHOLE = {"gspo", "gmpo"}
"""Losses of whole sequences."""


@cache
def parts() -> tuple[Learner, MicroBatch]:
    """A learner, and rows with gaps in their masks, sampled by yet another one."""
    learner = Learner(qwen3(dtype=DOUBLE))
    rows = [row(n, i, prompt=2) for i, n in enumerate([14, 5, 9, 11])]
    kept = [r.tokens[r.trained] % 5 != 0 for r in rows]
    rows = [
        replace(r, trained=r.trained[k], streams={"old_logprobs": r.streams["old_logprobs"][k]})
        for r, k in zip(rows, kept, strict=True)
    ]
    credit = [1.5, -1.0, 0.4, -0.3]
    (micro,) = pack([sample(r, credit[i], i) for i, r in enumerate(rows)], max_tokens=99).micro
    near = learner.logprobs(micro)[0]
    wave = torch.sin(torch.arange(len(near), dtype=DOUBLE))
    return learner, micro.having(old_logprobs=near + 0.5 * wave, proximal=near + 0.2 * wave.flip(0))


@cache
def other() -> Backbone:
    """The reference."""
    return Backbone(qwen3(seed=1, dtype=DOUBLE).requires_grad_(False))


def gradient(learner: Learner, micro: MicroBatch, temperature: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    metrics = learner.backward(micro, temperature)
    found = gradients(learner.model)
    learner.model.zero_grad(set_to_none=True)
    return found, metrics


def naive(learner: Learner, micro: MicroBatch, temperature: float) -> dict[str, Tensor]:
    """Full logits and autograd, with the learner's own per-token terms."""
    weight, _ = learner.backbone.head()
    logits = learner.backbone.hidden(micro)[micro.streams["source"]] @ weight.t() / temperature
    every = logits.log_softmax(-1)
    new, entropy = every.gather(1, micro.streams["target"][:, None])[:, 0], -(every.exp() * every).sum(-1)
    reference = learner.reference_logprobs(micro, temperature)
    losses, _ = learner.losses(micro.streams, new, entropy, reference)
    (micro.streams["weight"] * losses).sum().backward()
    found = gradients(learner.model)
    learner.model.zero_grad(set_to_none=True)
    return found


PULLS = [{"kl": kind, "kl_weight": 0.1} for kind in ("k1", "k2", "k3")]
KLS = st.sampled_from([{}, *PULLS, {"kl": "k1", "kl_weight": 0.1, "kl_in": "reward"}])
CORRECTED = st.builds(CorrectionConfig, st.sampled_from(["none", *CORRECTIONS]), st.sampled_from(["token", "sequence"]))
CHUNKS = st.builds(Sizes, st.integers(1, 40), st.integers(1, 2000), st.integers(1, 400), st.just(64))


@token_level
def by_entropy(s: Streams, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """A user's loss that trains uncertain tokens more; the entropy is a constant."""
    return -s.advantages * s.entropy * torch.exp(s.logprobs - s.old_logprobs), {}


@pytest.mark.parametrize("name", [*LOSSES, "test_one_pass:by_entropy"])
@settings(max_examples=12, deadline=None)
@given(KLS, CORRECTED, st.sampled_from([0.0, 0.03]), CHUNKS, st.sampled_from([1.0, 0.7]))
def test_one_gradient_in_one_pass_two_passes_and_full_logits(
    name: str, kl: dict[str, object], correction: CorrectionConfig, bonus: float, sizes: Sizes, temperature: float
) -> None:
    learner, micro = parts()
    loss = LossConfig(name, entropy_weight=bonus, correction=correction, **kl)  # type: ignore[arg-type]
    whole_kl, whole_weight = "kl_in" in kl, correction.name != "none" and correction.level == "sequence"
    assert loss.token_level == (name not in WHOLE and not whole_kl and not whole_weight)
    learner.loss, learner.loss_fn, learner.one_pass = loss, loss_function(name), loss.token_level
    usual, learner.reference = heads.SIZES["cpu"], other() if loss.uses_reference else None
    try:
        heads.SIZES["cpu"] = sizes
        got, metrics = gradient(learner, micro, temperature)
        learner.one_pass = False
        two, same = gradient(learner, micro, temperature)
    finally:
        heads.SIZES["cpu"] = usual
    want = naive(learner, micro, temperature)
    assert got.keys() == two.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], two[key], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=1e-12)
    assert metrics == pytest.approx(same, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_loss_says_token_level_if_and_only_if_it_is(name: str, cut: int, seed: int) -> None:
    """Called for some tokens it gives what it gives for them among all; a loss of sequences does not."""
    generator = torch.Generator().manual_seed(seed)
    new, old, credit, spread = (torch.randn(9, dtype=DOUBLE, generator=generator) for _ in range(4))
    streams = Streams(new, old, credit, torch.arange(9) // 5, spread.abs())
    config = LossConfig(name, clip_low=1.0, clip_high=99.0)
    whole, metrics = LOSSES[name](streams, config)
    halves = [LOSSES[name](_streams(streams, part), config) for part in (slice(0, cut), slice(cut, 9))]
    same = torch.allclose(torch.cat([loss for loss, _ in halves]), whole, rtol=1e-14, atol=1e-14)
    assert same == (config.token_level or cut == 5)
    for key in metrics if config.token_level else ():
        assert torch.equal(torch.cat([found[key] for _, found in halves]), metrics[key])


def _streams(s: Streams, part: slice) -> Streams:
    return Streams(s.logprobs[part], s.old_logprobs[part], s.advantages[part], s.sequence[part], s.entropy[part])


CALLS: list[int] = []


def whole_batches(s: Streams, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """A user's loss that compares tokens, and says nothing."""
    CALLS.append(len(s.logprobs))
    return -(s.advantages - s.advantages.mean()) * s.logprobs, {}


@token_level
def tokens(s: Streams, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """A user's loss that says that it takes tokens one by one."""
    CALLS.append(len(s.logprobs))
    return -s.advantages * s.logprobs, {"policy/credit": s.advantages}


def test_a_user_s_loss_sees_whole_micro_batches_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.SIZES, "cpu", Sizes(4, 10**6, 10**6, 64))
    batch = pack([sample(row(n, n), 1.0, n) for n in (9, 7, 12)], max_tokens=99)
    count = batch.micro[0].trained
    for fn, calls in ((whole_batches, [count]), (tokens, [4] * (count // 4) + [count % 4] * (count % 4 > 0))):
        CALLS.clear()
        learner = Learner(qwen3(), loss=LossConfig(f"test_one_pass:{fn.__name__}"))
        metrics = learner.step(batch)
        assert calls == CALLS
        assert metrics.get("policy/credit", 1.0) == 1.0


def test_adapters_only() -> None:
    """Under LoRA the head is frozen: the same gradients in one pass and two, none of the head's."""
    model = prepare(qwen3(dtype=DOUBLE), lora=LoraConfig(rank=2))
    _, micro = parts()
    learner = Learner(model)
    assert learner.one_pass
    one, _ = gradient(learner, micro, 1.0)
    learner.one_pass = False
    two, _ = gradient(learner, micro, 1.0)
    assert {key.split(".")[-3] for key in one} == {"lora_A", "lora_B"}
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-12, atol=1e-12)
