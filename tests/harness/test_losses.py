"""Losses against closed forms, and KL terms against a policy small enough to enumerate."""

from __future__ import annotations

import math

import pytest
import torch

from llm_gym.errors import ConfigError
from llm_gym.harness.losses import LossConfig, k1, k2, k3, kl_loss, loss_function, ppo_clip, sft

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
    assert loss_function("llm_gym.harness.losses:LOSSES") is not None


# A policy over three tokens: every expectation below is a sum of three terms, nothing is sampled.

THETA = torch.tensor([0.3, -0.5, 0.9], dtype=DOUBLE)
REFERENCE = torch.tensor([0.1, 0.6, -0.7], dtype=DOUBLE).log_softmax(0)
SAMPLER = torch.tensor([-0.2, 0.4, 0.2], dtype=DOUBLE).log_softmax(0)


def exact_kl_gradient(theta: torch.Tensor) -> torch.Tensor:
    theta = theta.clone().requires_grad_()
    logp = theta.log_softmax(0)
    return torch.autograd.grad((logp.exp() * (logp - REFERENCE)).sum(), theta)[0]


def expected_gradient(estimator, sampler: torch.Tensor | None) -> torch.Tensor:
    """E over tokens of the sampler (None: the policy itself) of the gradient of a per-token term."""
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)
    drawn_from = logp.detach() if sampler is None else sampler
    return torch.autograd.grad((drawn_from.exp() * estimator(logp, drawn_from)).sum(), theta)[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("sampler", [None, SAMPLER], ids=["on-policy", "off-policy"])
def test_every_kl_term_has_the_gradient_of_the_reverse_kl(kind: str, sampler: torch.Tensor | None) -> None:
    got = expected_gradient(lambda new, old: kl_loss(new, old, REFERENCE, kind=kind), sampler)
    torch.testing.assert_close(got, exact_kl_gradient(THETA), rtol=1e-12, atol=1e-12)


def test_k1_and_k3_differentiated_as_they_stand_have_another_gradient() -> None:
    """What many trainers do: k1's gradient vanishes, k3's is the forward KL's, only k2's is right."""
    exact = exact_kl_gradient(THETA)
    naive = {f.__name__: expected_gradient(lambda new, old, f=f: f(new, REFERENCE), None) for f in (k1, k2, k3)}
    torch.testing.assert_close(naive["k1"], torch.zeros(3, dtype=DOUBLE), atol=1e-12, rtol=0)
    torch.testing.assert_close(naive["k2"], exact, atol=1e-12, rtol=0)
    torch.testing.assert_close(naive["k3"], THETA.softmax(0) - REFERENCE.exp(), atol=1e-12, rtol=0)
    assert (naive["k3"] - exact).abs().max() > 0.05


def test_estimators_values() -> None:
    logp = THETA.log_softmax(0)
    kl = (logp.exp() * (logp - REFERENCE)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((logp.exp() * estimator(logp, REFERENCE)).sum(), kl)
    assert (k3(logp, REFERENCE) >= 0).all()
