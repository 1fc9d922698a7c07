"""The tiled head against plain logits: values, gradients, precision, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_gym.harness import logprobs as head
from llm_gym.harness.logprobs import token_logprobs

DOUBLE = torch.float64


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even for tiny inputs, the last ones ragged."""
    monkeypatch.setattr(head, "TOKENS", 3)
    monkeypatch.setattr(head, "VOCABULARY", 4)


def inputs(count: int, hidden: int, vocabulary: int, dtype: torch.dtype = DOUBLE, scale: float = 1.0):
    generator = torch.Generator().manual_seed(count + hidden + vocabulary)
    h = torch.randn(count, hidden, dtype=DOUBLE, generator=generator) * scale
    w = torch.randn(vocabulary, hidden, dtype=DOUBLE, generator=generator)
    b = torch.randn(vocabulary, dtype=DOUBLE, generator=generator)
    t = torch.randint(0, vocabulary, (count,), generator=generator)
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), t


def plain(h, w, t, b=None, temperature=1.0):
    logp = (torch.nn.functional.linear(h, w, b) / temperature).log_softmax(-1)
    return logp.gather(1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(with_bias: bool, temperature: float) -> None:
    h, w, b, t = inputs(7, 5, 11)

    def fn(h, w, b):
        return token_logprobs(h, w, t, bias=b if with_bias else None, temperature=temperature)

    assert torch.autograd.gradcheck(fn, (h, w, b))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 13), st.sampled_from([0.5, 1.0, 1.7]))
def test_equal_to_plain_logits(count: int, hidden: int, vocabulary: int, temperature: float) -> None:
    h, w, b, t = inputs(count, hidden, vocabulary)
    weights = torch.randn(2, count, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    results = []
    tokens, columns = head.TOKENS, head.VOCABULARY
    try:
        head.TOKENS, head.VOCABULARY = 4, 5
        got = token_logprobs(h, w, t, bias=b, temperature=temperature)
        results.append((*got, *torch.autograd.grad((weights * torch.stack(got)).sum(), (h, w, b))))
    finally:
        head.TOKENS, head.VOCABULARY = tokens, columns
    want = plain(h, w, t, b, temperature)
    results.append((*want, *torch.autograd.grad((weights * torch.stack(want)).sum(), (h, w, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_entropy_off_gives_zeros_and_the_same_log_probabilities() -> None:
    h, w, _, t = inputs(7, 5, 11)
    logp, entropy = token_logprobs(h, w, t, entropy=False)
    torch.testing.assert_close(logp, plain(h, w, t)[0])
    assert not entropy.requires_grad
    assert (entropy == 0).all()
    grads = torch.autograd.grad(logp.sum(), (h, w))
    for ours, theirs in zip(grads, torch.autograd.grad(plain(h, w, t)[0].sum(), (h, w)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_tiles")
def test_frozen_inputs_get_no_gradient() -> None:
    h, w, _, t = inputs(7, 5, 11)
    logp, _ = token_logprobs(h, w.detach(), t)
    assert torch.autograd.grad(logp.sum(), h)[0].shape == h.shape
    logp, _ = token_logprobs(h.detach(), w, t)
    assert torch.autograd.grad(logp.sum(), w)[0].shape == w.shape


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bfloat16_inputs_lose_nothing_more(scale: float, temperature: float) -> None:
    """bf16 logits would be off by up to 1/256 of their size; ours are within 1e-5 of float64 on the same inputs."""
    h, w, _, t = inputs(40, 64, 5000, torch.bfloat16, scale / 8)
    logp, entropy = token_logprobs(h, w, t, temperature=temperature)
    want = plain(h.double(), w.double(), t, temperature=temperature)
    assert logp.dtype == torch.float32
    assert ((logp - want[0]).abs() / want[0].abs().clamp(min=1)).max() <= 1e-5
    assert ((entropy - want[1]).abs()).max() <= 1e-5 * max(1, want[1].max())
    naive = plain(h, w, t, temperature=temperature)[0]
    assert (naive - want[0]).abs().max() > 1e-3


def test_autocast_changes_nothing() -> None:
    h, w, _, t = inputs(20, 16, 300, torch.float32)
    outside = token_logprobs(h, w, t)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(h, w, t)[0]
        (grad,) = torch.autograd.grad(inside.sum(), h)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(outside.sum(), h)[0], rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_large_and_equal_logits_are_safe() -> None:
    h = torch.tensor([[1.0], [-1.0], [0.0]])
    w = torch.tensor([[3000.0], [2999.0], [-3000.0], [0.0], [5.0]])
    t = torch.tensor([1, 0, 3])
    logp, entropy = token_logprobs(h, w, t)
    want = plain(h.double(), w.double(), t)
    torch.testing.assert_close(logp.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=1e-6)


def test_a_token_does_not_change_with_its_batch() -> None:
    """The same hidden state in the same place of a tile gives the same bits, whatever the others hold."""
    h, w, _, t = inputs(10, 16, 300, torch.float32)
    other = h.detach().clone()
    other[5:] = 7.0
    torch.testing.assert_close(token_logprobs(h, w, t)[0][:5], token_logprobs(other, w, t)[0][:5], rtol=0, atol=0)


def test_bad_inputs_are_refused() -> None:
    h, w, _, t = inputs(4, 3, 5)
    with pytest.raises(ValueError, match=r"hidden \[M, H\]"):
        token_logprobs(h, w.T, t)
    with pytest.raises(ValueError, match="temperature: got 0"):
        token_logprobs(h, w, t, temperature=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(dtype: torch.dtype) -> None:
    h, w, _, t = inputs(700, 64, 5000, dtype)
    h, w = h.detach().cuda().requires_grad_(), w.detach().cuda().requires_grad_()
    logp, _ = token_logprobs(h, w, t.cuda())
    want = plain(h.double(), w.double(), t.cuda())[0]
    torch.testing.assert_close(logp.double(), want, rtol=1e-3, atol=1e-3)
    ours = torch.autograd.grad(logp.sum(), (h, w))
    for a, b in zip(ours, torch.autograd.grad(want.sum(), (h, w)), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
