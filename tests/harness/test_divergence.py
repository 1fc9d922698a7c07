"""The tiled divergences against plain ones: values, gradients, bounds."""

from __future__ import annotations

import math

import pytest
import torch

from llm_gym.harness.model import divergence
from llm_gym.harness.model.divergence import Head, reverse_kl, top_k_kl, top_logprobs

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even for tiny inputs, the last ones ragged."""
    monkeypatch.setattr(divergence, "TOKENS", 3)
    monkeypatch.setattr(divergence, "VOCABULARY", 4)


def head(seed: int, hidden: int, vocabulary: int = 11, temperature: float = 1.0, bias: bool = True) -> Head:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((7, hidden), (vocabulary, hidden), (vocabulary,))
    h, w, b = (torch.randn(s, dtype=DOUBLE, generator=generator).requires_grad_() for s in shapes)
    return Head(h, w, b if bias else None, temperature)


def logs(of: Head, vocabulary: int | None = None) -> torch.Tensor:
    logits = torch.nn.functional.linear(of.hidden, of.weight, of.bias)[:, :vocabulary] / of.temperature
    return logits.log_softmax(-1)


def naive(student: Head, teacher: Head, vocabulary: int | None = None) -> torch.Tensor:
    p, q = logs(student, vocabulary), logs(teacher, vocabulary).detach()
    return (p.exp() * (p - q)).sum(-1)


def lumped(student: Head, teacher: Head, ids: torch.Tensor) -> torch.Tensor:
    p, q = (torch.gather(x.exp(), 1, ids) for x in (logs(student), logs(teacher).detach()))
    p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
    return (p * (p / q).log()).sum(1)


def same(ours: torch.Tensor, theirs: torch.Tensor, student: Head) -> None:
    weights = torch.linspace(-1, 2, 7, dtype=DOUBLE)
    inputs = [x for x in student[:3] if x is not None]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((weights * x).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_whole_divergence_and_its_gradient(bias: bool, temperature: float) -> None:
    student, teacher = head(1, 5, temperature=temperature, bias=bias), head(2, 6, temperature=temperature)
    same(reverse_kl(student, teacher), naive(student, teacher), student)
    assert torch.autograd.gradcheck(lambda h, w: reverse_kl(Head(h, w, None, temperature), teacher), student[:2])


def test_soft_caps_of_both_have_exact_gradients() -> None:
    random = torch.Generator().manual_seed(0)
    h, w, g, v = (torch.randn(n, 4, dtype=DOUBLE, generator=random) for n in (5, 9, 5, 9))
    teacher = Head(g, v, None, 1.0, 1.2)

    def logs(h, w, temperature, cap):
        return (cap * torch.tanh(h @ w.t() / cap) / temperature).log_softmax(-1)

    own, other = logs(h, w, 0.7, 0.8), logs(g, v, 1.0, 1.2)
    student = Head(h.requires_grad_(), w.requires_grad_(), None, 0.7, 0.8)
    torch.testing.assert_close(reverse_kl(student, teacher), (own.exp() * (own - other)).sum(-1))
    assert torch.autograd.gradcheck(lambda h, w: reverse_kl(Head(h, w, None, 0.7, 0.8), teacher), (h, w))
    ids, best = top_logprobs(teacher, 3)
    torch.testing.assert_close(best, other.topk(3).values)
    assert torch.autograd.gradcheck(lambda h, w: top_k_kl(Head(h, w, None, 0.7, 0.8), ids, best), (h, w))


def test_closed_form() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 log 2 + 1/4 log 1/2 = log(2) / 4."""
    p, q = (torch.tensor([x], dtype=DOUBLE).log() for x in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    eye = torch.eye(3, dtype=DOUBLE)
    student, teacher = Head(p, eye, None, 1.0), Head(q, eye, None, 1.0)
    torch.testing.assert_close(reverse_kl(student, teacher), torch.tensor([math.log(2) / 4], dtype=DOUBLE))
    assert reverse_kl(student, student).abs().max() < 1e-15
    ids, found = top_logprobs(teacher, 1)
    assert (ids.item(), found.exp().item()) == (2, pytest.approx(0.5))
    # Over {2, the rest}: 1/4 log(1/2) + 3/4 log(3/2).
    want = 0.25 * torch.tensor([0.5], dtype=DOUBLE).log() + 0.75 * torch.tensor([1.5], dtype=DOUBLE).log()
    torch.testing.assert_close(top_k_kl(student, ids, found), want)


@pytest.mark.parametrize(("mine", "theirs"), [(11, 9), (9, 11)])
def test_of_different_heads_the_common_ids_count(mine: int, theirs: int) -> None:
    student, teacher = head(1, 5, mine), head(2, 6, theirs)
    same(reverse_kl(student, teacher), naive(student, teacher, 9), student)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_with_its_gradient_is_the_plain_one_with_the_tail_lumped(k: int) -> None:
    student, teacher = head(1, 5), head(2, 6)
    ids, found = top_logprobs(teacher, k)
    every = logs(teacher)
    torch.testing.assert_close(ids, every.topk(k, 1).indices)
    torch.testing.assert_close(found, every.topk(k, 1).values)
    same(top_k_kl(student, ids, found), lumped(student, teacher, ids), student)


def test_more_tokens_see_more_of_the_divergence() -> None:
    student, teacher = head(1, 5), head(2, 6)
    whole = reverse_kl(student, teacher)
    before = torch.zeros_like(whole)
    for k in range(1, 12):
        now = top_k_kl(student, *top_logprobs(teacher, k))
        assert (now >= before - 1e-9).all()
        before = now
    torch.testing.assert_close(before, whole, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_sampled_form_on_average() -> None:
    """E over a ~ p of -(log q(a) - log p(a)) grad log p(a) = grad KL, by enumeration (the score's mean is 0)."""
    student, teacher = head(1, 5), head(2, 6)
    wanted = torch.autograd.grad(reverse_kl(student, teacher).sum(), student[:2])
    own, other = logs(student), logs(teacher).detach()
    advantage = (other - own).detach()
    loss = -(own.detach().exp() * advantage * own).sum()
    for a, b in zip(torch.autograd.grad(loss, student[:2]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_float32_is_as_good_as_float32() -> None:
    student, teacher = head(1, 5), head(2, 6)
    single = [Head(h.hidden.float(), h.weight.float(), h.bias.float(), 1.0) for h in (student, teacher)]
    torch.testing.assert_close(reverse_kl(*single).double(), naive(student, teacher), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reverse_kl(*single).double(), naive(student, teacher), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="want as many"):
        reverse_kl(student, Head(teacher.hidden[:3], *teacher[1:]))
