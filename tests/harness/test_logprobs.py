"""The tiled head against plain logits: values, gradients, precision, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_gym.harness.model import heads as head
from llm_gym.harness.model.heads import Sizes, token_logprobs, token_loss

DOUBLE = torch.float64


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even for tiny inputs, the last ones ragged."""
    monkeypatch.setitem(head.SIZES, "cpu", Sizes(tokens=3, logits=1000, piece=12, block=4))


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


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_soft_cap_has_exact_gradients(temperature: float) -> None:
    """In both forms, where some logits are well beyond the cap and some well within it."""
    h, w, b, t = inputs(7, 5, 11)
    fields = {"bias": b, "temperature": temperature, "softcap": 1.5}
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, t, **{**fields, "bias": b}), (h, w, b))
    logits = 1.5 * torch.tanh(torch.nn.functional.linear(h, w, b) / 1.5) / temperature
    logp = logits.log_softmax(-1)
    want = logp.gather(1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    for got, exact in zip(token_logprobs(h, w, t, **fields), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    credit = torch.linspace(-1, 2, len(t), dtype=DOUBLE)
    for entropy in (0.0, 0.3):
        loss = token_loss(
            h,
            w,
            t,
            lambda rows, logprobs, ent, e=entropy: credit[rows] * logprobs.exp() - e * ent,
            entropy_gradient=entropy != 0,
            **fields,
        )
        exact = (credit * want[0].exp() - entropy * want[1]).sum()
        torch.testing.assert_close(loss, exact)
        wanted = torch.autograd.grad(exact, (h, w, b), retain_graph=True)
        for got, grad in zip(torch.autograd.grad(loss, (h, w, b)), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-9, atol=1e-11)


def test_a_soft_cap_must_be_positive() -> None:
    h, w, _, t = inputs(2, 3, 4)
    with pytest.raises(ValueError, match=r"softcap: got 0\.0"):
        token_logprobs(h, w, t, softcap=0.0)


SHAPES = (st.integers(1, 9), st.integers(1, 6), st.integers(1, 13), st.sampled_from([0.5, 1.0, 1.7]))
CHUNKS = st.builds(Sizes, st.integers(1, 10), st.integers(1, 99), st.integers(1, 60), st.integers(1, 14))


@contextmanager
def sized(sizes: Sizes) -> Iterator[None]:
    """Chunks of these sizes while it lasts."""
    before, head.SIZES["cpu"] = head.SIZES["cpu"], sizes
    try:
        yield
    finally:
        head.SIZES["cpu"] = before


@settings(max_examples=50, deadline=None)
@given(*SHAPES, CHUNKS)
def test_equal_to_plain_logits(count: int, hidden: int, vocabulary: int, temperature: float, sizes: Sizes) -> None:
    h, w, b, t = inputs(count, hidden, vocabulary)
    weights = torch.randn(2, count, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    results = []
    with sized(sizes):
        got = token_logprobs(h, w, t, bias=b, temperature=temperature)
        results.append((*got, *torch.autograd.grad((weights * torch.stack(got)).sum(), (h, w, b))))
    want = plain(h, w, t, b, temperature)
    results.append((*want, *torch.autograd.grad((weights * torch.stack(want)).sum(), (h, w, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(*SHAPES, CHUNKS, st.booleans(), st.booleans(), st.sampled_from([1.0, -0.7]))
def test_one_pass_is_two_passes_and_plain_logits(
    count: int,
    hidden: int,
    vocabulary: int,
    temperature: float,
    sizes: Sizes,
    biased: bool,
    bonus: bool,
    scale: float,
) -> None:
    """Any loss of a token's log-probability and entropy: value and gradients, to 1e-12, whatever the chunks."""
    h, w, b, t = inputs(count, hidden, vocabulary)
    given_bias, inputs_ = (b, (h, w, b)) if biased else (None, (h, w))
    credit = torch.randn(count, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))

    def per_token(rows: slice, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return credit[rows] * logprobs.exp() + (credit[rows] ** 2 * entropy * logprobs if bonus else 0)

    values = []
    with sized(sizes):
        values.append(token_loss(h, w, t, per_token, bias=given_bias, temperature=temperature, entropy_gradient=bonus))
        values.append(per_token(slice(None), *token_logprobs(h, w, t, bias=given_bias, temperature=temperature)).sum())
        values.append(per_token(slice(None), *plain(h, w, t, given_bias, temperature)).sum())
        grads = [(v, *torch.autograd.grad(scale * v, inputs_)) for v in values]
    for ours, two, naive in zip(*grads, strict=True):
        torch.testing.assert_close(ours, two, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_one_pass_gives_the_loss_the_same_bits_as_the_log_probabilities() -> None:
    """So that a ratio against log-probabilities computed before, of the same micro-batch, is exactly 1."""
    h, w, _, t = inputs(7, 5, 11, torch.float32)
    seen = []

    def per_token(rows: slice, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        seen.append((rows, logprobs.detach(), entropy.detach()))
        return logprobs

    want = token_logprobs(h, w, t)
    for bonus in (False, True):
        seen.clear()
        token_loss(h, w, t, per_token, entropy_gradient=bonus)
        assert len(seen) == 3
        for rows, logprobs, entropy in seen:
            assert torch.equal(logprobs, want[0][rows])
            assert torch.equal(entropy, want[1][rows])
    assert torch.equal(token_logprobs(h, w, t, entropy=False)[0], want[0])


@pytest.mark.usefixtures("small_tiles")
def test_one_pass_leaves_out_what_is_frozen_and_runs_without_gradients() -> None:
    h, w, _, t = inputs(7, 5, 11)
    want = torch.autograd.grad(token_logprobs(h, w, t)[0].sum(), (h, w))
    for frozen, (ours, theirs) in enumerate([((h.detach(), w), w), ((h, w.detach()), h)]):
        loss = token_loss(*ours, t, lambda rows, logprobs, _: logprobs)
        torch.testing.assert_close(torch.autograd.grad(loss, theirs)[0], want[1 - frozen], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        loss = token_loss(h, w, t, lambda rows, logprobs, _: logprobs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(h, w, t)[0].sum())
    nothing = token_loss(h[:0], w, t[:0], lambda rows, logprobs, _: logprobs)
    assert (torch.autograd.grad(nothing, w)[0] == 0).all()


def test_one_pass_adds_up_over_micro_batches_and_hands_its_gradients_over_once() -> None:
    h, w, _, t = inputs(7, 5, 11)
    for part in (slice(0, 4), slice(4, 7)):
        token_loss(h[part], w, t[part], lambda rows, logprobs, _: logprobs).backward()
    want = torch.autograd.grad(plain(h, w, t)[0].sum(), (h, w))
    torch.testing.assert_close((h.grad, w.grad), want, rtol=1e-12, atol=1e-12)
    loss = token_loss(h, w, t, lambda rows, logprobs, _: logprobs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone back through twice"):
        loss.backward()
    with pytest.raises(ValueError, match=r"want losses \(7,\), got \(\)"):
        token_loss(h, w, t, lambda rows, logprobs, _: logprobs.sum())


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_loss_without_a_gradient_gives_none(entropy_gradient: bool) -> None:
    """Every token clipped: zeros, no error."""
    h, w, _, t = inputs(7, 5, 11)
    loss = token_loss(h, w, t, lambda rows, logprobs, _: logprobs.detach(), entropy_gradient=entropy_gradient)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (h, w)))


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
    one = token_loss(h, w, t, lambda rows, logprobs, _: logprobs, temperature=temperature)
    for ours, exact in zip(torch.autograd.grad(one, (h, w)), torch.autograd.grad(want[0].sum(), (h, w)), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), exact.float(), rtol=2**-7, atol=1e-5)


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
    two = torch.autograd.grad(logp.sum(), (h, w))
    one = torch.autograd.grad(token_loss(h, w, t.cuda(), lambda rows, logprobs, _: logprobs), (h, w))
    for a, b, c in zip(one, two, torch.autograd.grad(want.sum(), (h, w)), strict=True):
        torch.testing.assert_close(a.float(), c.float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(b.float(), c.float(), rtol=2e-2, atol=2e-2)
