"""The merged attention over random forests is attention with a dense mask, and so is its gradient."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_gym.harness.model import flash, prefix_attention
from llm_gym.harness.model.attention import Layout, concatenated
from llm_gym.harness.model.prefix_attention import Part, calls, merged_attention, parts, works

CPU = torch.device("cpu")


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths and parents of up to 14 pieces in depth-first order, any depth, many of a single token."""
    lengths, parents, path = [], [], list[int]()
    for piece in range(draw(st.integers(1, 14))):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        lengths.append(draw(st.sampled_from([1, 1, 2, 3, 5, 8, 8, 13, 21])))
        path.append(piece)
    return lengths, parents


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], parents: list[int], scale: float | None) -> Tensor:
    """The oracle: each token's keys are found by walking up, one by one."""
    piece = [i for i, n in enumerate(lengths) for _ in range(n)]
    mask = torch.zeros(len(piece), len(piece), dtype=torch.bool)
    for i, own in enumerate(piece):
        above = [own]
        while parents[above[-1]] >= 0:
            above.append(parents[above[-1]])
        mask[i] = torch.tensor([j <= i and piece[j] in above for j in range(len(piece))])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def streams(n: int, heads: int, groups: int, size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values [1, heads, n, size], laid out in memory as transformers has them."""
    generator = torch.Generator().manual_seed(n + size)
    return [
        torch.randn(1, n, h, size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for h in (heads, groups, groups)
    ]


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


SHAPES = st.sampled_from([(4, 4, 8), (4, 2, 16), (6, 2, 64), (4, 1, 33), (2, 2, 80), (3, 1, 1)])
"""Heads, key-value heads, size of a head."""


@settings(max_examples=60)
@given(forests(), SHAPES, st.sampled_from([None, 0.3]))
def test_either_form_is_attention_with_a_dense_mask(
    forest: tuple[list[int], list[int]], shape: tuple[int, int, int], scale: float | None
) -> None:
    lengths, parents = forest
    inputs = streams(sum(lengths), *shape)
    want = with_gradients(dense(*inputs, lengths, parents, scale), inputs)
    layout = Layout.of(lengths, CPU, parents)
    forms = merged_attention(*inputs, layout.plan, scale), concatenated(*inputs, layout, scale)
    for out in forms:
        for got, exact in zip(with_gradients(out, inputs), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_costs_no_more_than_plain_rows(dtype: torch.dtype) -> None:
    """Against float64; the error beside that of each row alone in the same type."""
    lengths, parents = [40, 30, 20, 10, 25, 60, 8], [-1, 0, 1, 1, 0, -1, 5]
    inputs = streams(sum(lengths), 4, 2, 64, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = with_gradients(dense(*exact, lengths, parents, None), exact)
    merged = with_gradients(merged_attention(*inputs, calls(lengths, parents, CPU), None), inputs)
    for got, exact_one in zip(merged, want, strict=True):
        error = float((got.double() - exact_one).norm() / exact_one.norm())
        assert error < 4 * torch.finfo(dtype).eps


def test_no_gradient_keeps_nothing() -> None:
    lengths, parents = [5, 3, 2], [-1, 0, 0]
    inputs = streams(10, 4, 2, 8)
    with torch.no_grad():
        out = merged_attention(*inputs, calls(lengths, parents, CPU), None)
    assert out.grad_fn is None
    torch.testing.assert_close(out, dense(*inputs, lengths, parents, None))


@settings(max_examples=60)
@given(forests())
def test_parts_cover_what_a_token_sees_once(forest: tuple[list[int], list[int]]) -> None:
    """Own pieces first; then one list for each depth, whose queries are disjoint."""
    lengths, parents = forest
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    first, *deeper = parts(lengths, parents)
    assert first == [Part((s, s + n), (s, s + n)) for s, n in zip(starts, lengths, strict=True)]
    seen: set[tuple[int, int]] = set()
    for level in deeper:
        tokens = [t for part in level for t in range(*part.queries)]
        assert len(tokens) == len(set(tokens))
        pairs = {(q, starts.index(part.keys[0])) for part in level for q in range(*part.queries)}
        assert not pairs & seen
        seen |= pairs
    want = set()
    for piece, parent in enumerate(parents):
        while parent >= 0:
            want |= {(t, parent) for t in range(starts[piece], starts[piece] + lengths[piece])}
            parent = parents[parent]
    assert seen == want


@pytest.mark.parametrize("parents", [[-1, 0, -1, 0], [0, -1], [-1, -1, 0], [1, -1]])
def test_another_order_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="not above the one before"):
        parts([2] * len(parents), parents)


def test_like_parts_share_a_call() -> None:
    """Two prompts of 6 with three completions each: prompts, completions, and completions over prompts."""
    plan = calls([6, 4, 4, 4, 6, 4, 4, 4], [-1, 0, 0, 0, -1, 4, 4, 4], CPU)
    assert [(c.queries.sequences, c.queries.width, c.keys.width, c.causal) for c in plan] == [
        (2, 6, 6, True),
        (6, 4, 4, True),
        (2, 12, 6, False),
    ]


# Where it works


def test_it_works_on_this_machine() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v = streams(1, 4, 2, 64, dtype)
        assert works(q, k, v)


def test_a_value_head_of_another_size_is_concatenated_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    prefix_attention.tried.cache_clear()
    q, k, _ = streams(9, 4, 2, 16)
    v = streams(9, 4, 2, 24)[2]
    lengths, parents = [4, 3, 2], [-1, 0, 0]
    with caplog.at_level(logging.WARNING):
        assert not works(q, k, v)
        assert not works(q, k, v)
    assert len(caplog.records) == 1
    assert "keys are concatenated" in caplog.text
    out = concatenated(q, k, v, Layout.of(lengths, CPU, parents), None)
    torch.testing.assert_close(out, dense(q, k, v, lengths, parents, None))


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prefix_attention.tried.cache_clear()
    right = prefix_attention.CPUFlash.backward
    monkeypatch.setattr(prefix_attention.CPUFlash, "backward", lambda *args: tuple(1.01 * x for x in right(*args)))
    assert not works(*streams(1, 4, 2, 8))
    assert "off by 1.0e-02" in caplog.text
    prefix_attention.tried.cache_clear()


def test_a_device_without_a_kernel_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert not works(*(x.to("meta") for x in streams(1, 4, 2, 8)))
    assert "on meta" in caplog.text


# The variable-length kernels: they need a GPU, so the real ones have never run in these tests


class Varlen:
    """What `aten._flash_attention_forward` and `_backward` compute, by their documentation; checks what they ask for."""

    @staticmethod
    def _sequences(q, k, cu_q, cu_k, longest, causal):
        for x in (q, k):
            assert x.is_contiguous()
            assert x.shape[-1] % 8 == 0
        assert cu_q.dtype == cu_k.dtype == torch.int32
        sizes = [(int(a), int(b)) for a, b in zip(cu_q.diff(), cu_k.diff(), strict=True)]
        assert longest == (max(a for a, _ in sizes), max(b for _, b in sizes))
        assert (len(q), len(k)) == (int(cu_q[-1]), int(cu_k[-1]))
        for (n, m), start_q, start_k in zip(sizes, cu_q, cu_k, strict=False):
            mask = torch.ones(n, m, dtype=torch.bool)
            yield slice(start_q, start_q + n), slice(start_k, start_k + m), mask.tril(m - n) if causal else mask

    @classmethod
    def _flash_attention_forward(cls, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        groups = q.shape[1] // k.shape[1]
        for rows, columns, mask in cls._sequences(q, k, cu_q, cu_k, (max_q, max_k), causal):
            keys, values = (x[columns].repeat_interleave(groups, 1) for x in (k, v))
            scores = (torch.einsum("nhd,mhd->hnm", q[rows], keys) * scale).masked_fill(~mask, -torch.inf)
            lse[:, rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values)
        return out, lse, None, None, None

    @classmethod
    def _flash_attention_backward(
        cls, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale
    ):
        assert lse.shape == (q.shape[1], len(q))
        assert lse.is_contiguous()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        for rows, columns, mask in cls._sequences(q, k, cu_q, cu_k, (max_q, max_k), causal):
            keys, values = (x[columns].repeat_interleave(groups, 1) for x in (k, v))
            scores = (torch.einsum("nhd,mhd->hnm", q[rows], keys) * scale).masked_fill(~mask, -torch.inf)
            p = (scores - lse[:, rows, None]).exp()
            delta = (grad[rows] * out[rows]).sum(-1).T[..., None]
            ds = p * (torch.einsum("nhd,mhd->hnm", grad[rows], values) - delta) * scale
            dq[rows] = torch.einsum("hnm,mhd->nhd", ds, keys)
            for total, part in ((dk, (ds, q[rows])), (dv, (p, grad[rows]))):
                total[columns] = torch.einsum("hnm,nhd->mhd", *part).unflatten(1, (-1, groups)).sum(2)
        return dq, dk, dv


@settings(max_examples=25)
@given(forests(), SHAPES)
def test_what_surrounds_a_variable_length_kernel_is_right(
    forest: tuple[list[int], list[int]], shape: tuple[int, int, int]
) -> None:
    lengths, parents = forest
    inputs = streams(sum(lengths), *shape)
    want = with_gradients(dense(*inputs, lengths, parents, None), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "aten", Varlen)
        patch.setitem(prefix_attention.PLANS, "cpu", prefix_attention.cuda_calls)
        out = merged_attention(*inputs, calls(lengths, parents, CPU), None)
        found = with_gradients(out, inputs)
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_the_real_variable_length_kernels_take_our_arguments() -> None:
    """On the meta device, which knows shapes alone."""
    (call,) = prefix_attention.cuda_calls(parts([3, 2, 4], [-1, 0, 0])[1], False, CPU)
    q, k, v = (torch.empty(1, h, n, 12, dtype=torch.bfloat16, device="meta") for h, n in ((4, 6), (2, 3), (2, 3)))
    out, lse = call.kernel.forward(q, k, v, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, 4, 6, 1), torch.float32)
    grads = call.kernel.backward(out, q, k, v, out, lse, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
