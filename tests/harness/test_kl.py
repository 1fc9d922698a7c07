"""KL terms against policies small enough to enumerate: every expectation is a finite sum, nothing is sampled."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from llm_gym.harness.algorithms.importance_sampling import CORRECTIONS, CorrectionConfig, importance_weights
from llm_gym.harness.algorithms.kl import KL, k1, k2, k3, kl_loss, kl_suffix_sum
from llm_gym.harness.algorithms.losses import reinforce

DOUBLE = torch.float64

# A policy over three tokens.

THETA = torch.tensor([0.3, -0.5, 0.9], dtype=DOUBLE)
REFERENCE = torch.tensor([0.1, 0.6, -0.7], dtype=DOUBLE).log_softmax(0)
SAMPLER = torch.tensor([-0.2, 0.4, 0.2], dtype=DOUBLE).log_softmax(0)


def exact_kl_gradient(theta: torch.Tensor) -> torch.Tensor:
    theta = theta.clone().requires_grad_()
    logp = theta.log_softmax(0)
    return torch.autograd.grad((logp.exp() * (logp - REFERENCE)).sum(), theta)[0]


def expected_gradient(estimator, sampler: torch.Tensor | None, at: torch.Tensor = THETA) -> torch.Tensor:
    """E over tokens of the sampler (None: the policy itself) of the gradient of a per-token term."""
    theta = at.clone().requires_grad_()
    logp = theta.log_softmax(0)
    drawn_from = logp.detach() if sampler is None else sampler
    return torch.autograd.grad((drawn_from.exp() * estimator(logp, drawn_from)).sum(), theta)[0]


def spread(estimator, at: torch.Tensor, sampler: torch.Tensor | None) -> float:
    """The variance of that gradient from token to token, summed over its elements."""
    theta = at.clone().requires_grad_()
    logp = theta.log_softmax(0)
    drawn_from = logp.detach() if sampler is None else sampler
    terms = estimator(logp, drawn_from)
    each = torch.stack([torch.autograd.grad(term, theta, retain_graph=True)[0] for term in terms])
    chance = drawn_from.exp()[:, None]
    return float((chance * (each - (chance * each).sum(0)) ** 2).sum())


def differentiated_k1(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.exp(new - old) * k1(new, REFERENCE)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("sampler", [None, SAMPLER], ids=["on-policy", "off-policy"])
def test_every_kl_term_has_the_gradient_of_the_reverse_kl(kind: str, sampler: torch.Tensor | None) -> None:
    got = expected_gradient(lambda new, old: kl_loss(new, old, REFERENCE, kind=kind), sampler)
    torch.testing.assert_close(got, exact_kl_gradient(THETA), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KL)
@pytest.mark.parametrize("sampler", [None, SAMPLER], ids=["on-policy", "off-policy"])
def test_no_kl_term_carries_noise_of_mean_zero(kind: str, sampler: torch.Tensor | None) -> None:
    """Differentiating ratio * k1 adds ratio * grad log p: the same mean, a larger spread, and not 0 at the reference."""
    ours = spread(lambda new, old: kl_loss(new, old, REFERENCE, kind=kind), THETA, sampler)
    assert ours < 0.6 * spread(differentiated_k1, THETA, sampler)
    at_home = spread(lambda new, old: kl_loss(new, old, REFERENCE, kind=kind), REFERENCE, sampler)
    assert at_home == pytest.approx(0, abs=1e-24)
    assert spread(differentiated_k1, REFERENCE, sampler) > 0.5


@pytest.mark.parametrize("name", CORRECTIONS)
def test_cut_ratios_pull_nobody_away_from_the_reference(name: str) -> None:
    """The noise has mean zero under the whole ratio only; where `corrections` cut it, it would be a bias."""
    config = CorrectionConfig(name, low=0.5, high=1.3)
    one = torch.arange(3)
    weight, streams = importance_weights(REFERENCE, SAMPLER, one, config)
    assert streams["sampler/weight_cut_fraction"].sum() > 0
    pulls = [
        expected_gradient(lambda new, old, f=f: weight * f(new, REFERENCE), SAMPLER, REFERENCE)
        for f in (lambda new, old: kl_loss(new, old, REFERENCE, kind="k1"), differentiated_k1)
    ]
    torch.testing.assert_close(pulls[0], torch.zeros(3, dtype=DOUBLE), atol=1e-15, rtol=0)
    assert pulls[1].abs().max() > 0.01


def test_a_token_that_the_reference_finds_far_likelier_has_a_gradient_in_float32() -> None:
    """Its slope is log(p / reference); formed as a difference of terms of size reference / p it is lost."""
    logprob, reference = torch.tensor([-25.0, -95.0], requires_grad=True), torch.tensor([-0.5, -0.5])
    for kind in KL:
        (slope,) = torch.autograd.grad(kl_loss(logprob, logprob.detach(), reference, kind=kind).sum(), logprob)
        assert slope.tolist() == [-24.5, -94.5], kind


def test_an_estimator_of_one_s_own_is_differentiated_as_it_stands() -> None:
    got = expected_gradient(lambda new, old: kl_loss(new, old, REFERENCE, kind=f"{__name__}:squared"), None)
    want = expected_gradient(lambda new, old: torch.exp(new - old) * squared(new, REFERENCE), None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def squared(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs - ref_logprobs) ** 2


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


# A policy over sequences of two tokens: the second token's distribution depends on the first.

TREE = {
    (): THETA,
    0: torch.tensor([1.0, 0.0, -1.0]),
    1: torch.tensor([0.2, 0.1, 0.5]),
    2: torch.tensor([-2.0, 0.3, 1.0]),
}
TREE_REFERENCE = {(): REFERENCE, 0: SAMPLER, 1: REFERENCE.flip(0), 2: SAMPLER.flip(0)}


def test_kl_in_the_reward_has_the_gradient_of_the_kl_of_whole_sequences() -> None:
    """And KL in the loss that of each state's own KL: it leaves out that the first token decides the next state."""
    params = {state: theta.double().requires_grad_() for state, theta in TREE.items()}
    policy = {state: theta.log_softmax(0) for state, theta in params.items()}
    exact, as_reward, as_loss = (torch.zeros((), dtype=DOUBLE) for _ in range(3))
    for first, second in product(range(3), repeat=2):
        new = torch.stack([policy[()][first], policy[first][second]])
        ref = torch.stack([TREE_REFERENCE[()][first], TREE_REFERENCE[first][second]])
        chance, one = new.sum().exp(), torch.zeros(2, dtype=torch.int64)
        exact = exact + chance * (new - ref).sum()
        as_reward = as_reward + chance.detach() * reinforce(new, new.detach(), -kl_suffix_sum(new, ref, one))[0].sum()
        as_loss = as_loss + chance.detach() * kl_loss(new, new.detach(), ref, kind="k3").sum()
    want, got, local = (
        torch.autograd.grad(x, list(params.values()), retain_graph=True) for x in (exact, as_reward, as_loss)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (local[0] - want[0]).abs().max() > 0.03


def test_kl_to_go_stays_inside_its_sequence() -> None:
    new, ref = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.zeros(5)
    got = kl_suffix_sum(new.requires_grad_(), ref, torch.tensor([0, 0, 0, 1, 1]))
    assert got.tolist() == [7, 6, 4, 24, 16]
    assert not got.requires_grad
