"""Losses against closed forms, and KL terms against a policy small enough to enumerate."""

from __future__ import annotations

import math

import pytest
import torch

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import (
    LOSSES,
    LossConfig,
    LossFn,
    by_advantage,
    cispo,
    dual_clip,
    gmpo,
    gspo,
    loss_function,
    ppo_clip,
    reinforce,
    sapo,
    sft,
)
from llm_gym.harness.algorithms.streams import Streams

DOUBLE = torch.float64


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_clip_is_ppo_s_for_either_sign_of_the_advantage(sign: float, ratio: float) -> None:
    """Gradient of the loss by the log-probability is -A * ratio, or 0 where the clip holds.

    It holds for A > 0 above 1 + high and for A < 0 BELOW 1 - low; an inverted clip gives 1 at A=-1, ratio 0.5.
    """
    new = torch.tensor([math.log(ratio)], dtype=DOUBLE, requires_grad=True)
    loss, streams = ppo_clip(
        new, torch.zeros(1, dtype=DOUBLE), torch.tensor([sign], dtype=DOUBLE), clip_low=0.2, clip_high=0.3
    )
    loss.sum().backward()
    held = (sign > 0 and ratio > 1.3) or (sign < 0 and ratio < 0.8)
    counted = {True: 1.3 if sign > 0 else 0.8, False: ratio}[held]
    assert loss.item() == pytest.approx(-sign * counted)
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(0.0 if held else -sign * ratio)
    assert streams["policy/clip_fraction"].item() == held
    assert streams["policy/ratio_mean"].item() == pytest.approx(ratio)


def test_low_and_high_clip_are_separate() -> None:
    ratio = torch.tensor([1.25, 1.35, 0.75, 0.85], dtype=DOUBLE)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=DOUBLE)
    loss, _ = ppo_clip(ratio.log(), torch.zeros(4, dtype=DOUBLE), advantage, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([-1.25, -1.28, 0.8, 0.85], dtype=DOUBLE))


def test_on_policy_the_clipped_loss_has_the_plain_policy_gradient() -> None:
    new = torch.randn(9, dtype=DOUBLE, requires_grad=True)
    advantages = torch.randn(9, dtype=DOUBLE)
    loss, _ = ppo_clip(new, new.detach(), advantages, clip_low=0.2, clip_high=0.2)
    (grad,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(grad, -advantages, rtol=0, atol=0)


def test_sft_is_cross_entropy() -> None:
    logits = torch.randn(5, 7, dtype=DOUBLE)
    targets = torch.tensor([0, 6, 3, 3, 1])
    loss, _ = sft(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(loss.mean(), torch.nn.functional.cross_entropy(logits, targets))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ppo_clip(torch.zeros(3), torch.zeros(3), torch.zeros(1), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="one shape"):
        sft(torch.zeros(2, 3))


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ppo_clip'"):
        LossConfig(name="ppo_clp")
    with pytest.raises(ConfigError, match=r"loss\.kl: unknown value 'k4'"):
        LossConfig(kl="k4")
    with pytest.raises(ConfigError, match=r"loss\.clip_low: got 1\.5"):
        LossConfig(clip_low=1.5)
    with pytest.raises(ConfigError, match=r"loss\.clip_dual: got 1\.0"):
        LossConfig(name="dual_clip", clip_dual=1.0)
    with pytest.raises(ConfigError, match=r"loss\.kl_in: unknown value 'rewards'"):
        LossConfig(kl_in="rewards")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"loss\.kl: got 'k3' with kl_in='reward', want 'k1'"):
        LossConfig(kl="k3", kl_weight=0.1, kl_in="reward")
    assert loss_function("test_losses:gradient_of") is not None


# Every loss against its formula: value, and gradient by each log-probability, in float64.

NEW = torch.tensor([-1.2, -0.3, -2.0, -0.7, -1.5, -0.1, -3.0], dtype=DOUBLE)
OLD = torch.tensor([-1.0, -0.9, -1.4, -0.7, -2.7, -0.4, -2.9], dtype=DOUBLE)
SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 2, 2])
ENTROPY = torch.tensor([0.9, 0.2, 1.6, 0.7, 1.1, 0.3, 2.0], dtype=DOUBLE)
PER_SEQUENCE = torch.tensor([1.5, -0.5, 0.8], dtype=DOUBLE)
CREDIT = PER_SEQUENCE[SEQUENCE]
MEMBERS = [[0, 1, 2], [3, 4], [5, 6]]


def gradient_of(loss: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), new)[0]


@by_advantage
def declared(s: Streams, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -s.advantages * s.logprobs, {}


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    """At A = -1: ratio 2 counts 2, ratios 4 and 9 count 3 without a gradient; at A = 1 it is the plain clip."""
    new = torch.tensor([2.0, 4.0, 9.0, 4.0, 0.5], dtype=DOUBLE).log().requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0, -1.0], dtype=DOUBLE)
    loss, streams = dual_clip(new, torch.zeros(5, dtype=DOUBLE), advantages, clip_low=0.2, clip_high=0.2, clip_dual=3.0)
    torch.testing.assert_close(loss, torch.tensor([2.0, 3.0, 3.0, -1.2, 0.8], dtype=DOUBLE))
    torch.testing.assert_close(gradient_of(loss, new), torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0], dtype=DOUBLE))
    assert streams["policy/clip_fraction"].tolist() == [0, 1, 1, 1, 1]


def test_gspo_is_the_clipped_sequence_ratio() -> None:
    """Value and gradient of -min(s A, clip(s) A) per sequence, s the geometric mean of its ratios, written out."""
    new = NEW.clone().requires_grad_()
    s = torch.stack([torch.exp((new - OLD)[m].mean()) for m in MEMBERS])
    want = -torch.minimum(s * PER_SEQUENCE, s.clamp(0.9, 1.1) * PER_SEQUENCE)
    loss, streams = gspo(new, OLD, CREDIT, SEQUENCE, clip_low=0.1, clip_high=0.1)
    torch.testing.assert_close(loss.detach(), want.detach()[SEQUENCE])
    lengths = torch.tensor([3.0, 2.0, 2.0], dtype=DOUBLE)[SEQUENCE]
    torch.testing.assert_close(gradient_of(loss / lengths, new), gradient_of(want, new))
    held = [(s[0] > 1.1).item(), (s[1] < 0.9).item(), (s[2] > 1.1).item()]
    assert streams["policy/clip_fraction"].bool().tolist() == [held[i] for i in SEQUENCE.tolist()]


def test_gspo_clips_whole_sequences_where_ppo_clips_tokens() -> None:
    """Ratios e and 1/e: each outside PPO's clip, their geometric mean exactly 1."""
    new, old = torch.tensor([0.0, -2.0], dtype=DOUBLE), torch.tensor([-1.0, -1.0], dtype=DOUBLE)
    one, advantages = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=DOUBLE)
    loss, streams = gspo(new, old, advantages, one, clip_low=3e-4, clip_high=4e-4)
    assert loss.tolist() == [-1, -1]
    assert streams["policy/clip_fraction"].sum() == 0


def test_gmpo_is_the_geometric_mean_of_clipped_ratios() -> None:
    new = NEW.clone().requires_grad_()
    low, high = math.log(0.8), math.log(1.4)
    want = []
    for advantage, members in zip(PER_SEQUENCE, MEMBERS, strict=True):
        log_ratio = (new - OLD)[members]
        kept = log_ratio.clamp(max=high) if advantage > 0 else log_ratio.clamp(min=low)
        want.append(-advantage * torch.exp(kept).prod() ** (1 / len(members)))
    loss, streams = gmpo(new, OLD, CREDIT, SEQUENCE, clip_low=0.2, clip_high=0.4)
    torch.testing.assert_close(loss.detach(), torch.stack(want).detach()[SEQUENCE])
    lengths = torch.tensor([3.0, 2.0, 2.0], dtype=DOUBLE)[SEQUENCE]
    torch.testing.assert_close(gradient_of(loss / lengths, new), gradient_of(torch.stack(want), new))
    assert streams["policy/clip_fraction"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    unbounded, _ = gmpo(new, OLD, -CREDIT.abs(), SEQUENCE, clip_low=1.0, clip_high=0.4)
    assert torch.isfinite(unbounded).all()


def test_cispo_clips_the_weight_and_keeps_every_token() -> None:
    """Gradient -min(ratio, 1 + high) * A, never 0, where PPO's clip gives 0."""
    ratio = torch.tensor([0.1, 0.9, 1.0, 3.0, 8.0], dtype=DOUBLE)
    new = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0, -1.0, 1.0], dtype=DOUBLE)
    loss, streams = cispo(new, torch.zeros(5, dtype=DOUBLE), advantages, clip_low=1.0, clip_high=4.0)
    weight = torch.tensor([0.1, 0.9, 1.0, 3.0, 5.0], dtype=DOUBLE)
    torch.testing.assert_close(loss.detach(), -weight * advantages * new.detach())
    torch.testing.assert_close(gradient_of(loss, new), -weight * advantages)
    assert streams["policy/clip_fraction"].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05), (-1.0, 1.05)])
def test_sapo_is_a_soft_gate(advantage: float, tau: float) -> None:
    """Gradient by the log-probability: -A * ratio * 4 p (1 - p), p = sigmoid(tau (ratio - 1)); at ratio 1 it is -A."""
    ratio = torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE)
    new = ratio.log().requires_grad_()
    loss, _ = sapo(
        new,
        torch.zeros(3, dtype=DOUBLE),
        torch.full((3,), advantage, dtype=DOUBLE),
        tau_positive=1.0,
        tau_negative=1.05,
    )
    p = 1 / (1 + torch.exp(-tau * (ratio - 1)))
    torch.testing.assert_close(loss.detach(), -advantage * 4 / tau * p)
    grad = gradient_of(loss, new)
    torch.testing.assert_close(grad, -advantage * ratio * 4 * p * (1 - p))
    assert grad[1].item() == pytest.approx(-advantage)


def test_reinforce_is_the_plain_policy_gradient() -> None:
    new = NEW.clone().requires_grad_()
    loss, _ = reinforce(new, OLD, CREDIT)
    torch.testing.assert_close(loss.detach(), -CREDIT * NEW)
    torch.testing.assert_close(gradient_of(loss, new), -CREDIT)


POLICY_LOSSES = [name for name in LOSSES if not LossConfig(name).needs_every_sequence]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_every_loss_has_the_plain_policy_gradient(name: str) -> None:
    """At ratio 1 no clip, gate or mean changes anything: the gradient is -A for every token."""
    new = NEW.clone().requires_grad_()
    loss, streams = LOSSES[name](Streams(new, NEW, CREDIT, SEQUENCE, ENTROPY), LossConfig(name=name))
    torch.testing.assert_close(gradient_of(loss, new), -CREDIT, rtol=1e-15, atol=1e-15)
    assert (streams["policy/ratio_mean"] == 1).all()
    assert streams.get("policy/clip_fraction", torch.zeros(1)).sum() == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_no_advantage_no_gradient(name: str) -> None:
    """What lets `pack` skip sequences of zero advantage."""
    new = NEW.clone().requires_grad_()
    loss, _ = LOSSES[name](Streams(new, OLD, torch.zeros_like(NEW), SEQUENCE, ENTROPY), LossConfig(name=name))
    assert gradient_of(loss, new).abs().sum() == 0 == loss.abs().sum()


def test_what_says_nothing_of_itself_is_computed_everywhere() -> None:
    assert LOSSES.keys() - POLICY_LOSSES == {"sft"}
    assert LossConfig("test_losses:gradient_of").needs_every_sequence
    assert not LossConfig("test_losses:declared").needs_every_sequence
    assert LossConfig("test_losses:declared", entropy_weight=0.1).needs_every_sequence


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name not in ("cispo", "gspo")])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Central differences of the value; the other two hold a weight constant, and have their formulas tested above."""
    fn: LossFn = LOSSES[name]
    torch.autograd.gradcheck(
        lambda x: fn(Streams(x, OLD, CREDIT, SEQUENCE, ENTROPY), LossConfig(name=name))[0], NEW.clone().requires_grad_()
    )


# Exact policy gradients: a policy over three tokens, every expectation a sum of three terms.

THETA = torch.tensor([0.3, -0.5, 0.9], dtype=DOUBLE)
REWARD = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
SAMPLER = torch.tensor([0.1, -0.2, 0.6], dtype=DOUBLE).log_softmax(0)


def expected_gradient(name: str, sampler: torch.Tensor | None, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of E over the sampler's tokens (None: the policy's own) of the loss, and of minus the expected reward."""
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)
    drawn_from = logp.detach() if sampler is None else sampler
    streams = Streams(
        logp, drawn_from, REWARD, torch.arange(3), torch.zeros(3, dtype=DOUBLE)
    )  # three sequences of one token
    loss, _ = LOSSES[name](streams, LossConfig(name=name, **settings))
    (got,) = torch.autograd.grad((drawn_from.exp() * loss).sum(), theta, retain_graph=True)
    (want,) = torch.autograd.grad(-(logp.exp() * REWARD).sum(), theta)
    return got, want


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_the_expected_gradient_is_that_of_the_reward(name: str) -> None:
    got, want = expected_gradient(name, None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "gspo", "gmpo", "cispo"])
def test_off_policy_inside_the_clip_it_still_is(name: str) -> None:
    """The ratio is the importance weight: tokens of another policy, the same expectation."""
    ratio = torch.exp(THETA.log_softmax(0) - SAMPLER)
    assert 0.1 < (ratio - 1).abs().max() < 0.5
    got, want = expected_gradient(name, SAMPLER, clip_low=0.5, clip_high=0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_off_policy_plain_reinforce_is_biased() -> None:
    got, want = expected_gradient("reinforce", SAMPLER)
    assert (got - want).abs().max() > 0.02
