"""KL(student || teacher) of whole next-token distributions, with its gradient, in tiles.

For every token the reverse KL divergence sum_j p_j (log p_j - log q_j) over the vocabulary, p the student's and q the
teacher's. Both distributions are made tile by tile from hidden states and head weights, forward and again backward,
so that memory is O(tokens + vocabulary); see `heads` for the same idea. With logits x of the student

    d KL / d x_j = p_j (log p_j - log q_j - KL),

and where the tail is lumped into one outcome, its log ratio stands for that of each token in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOKENS, VOCABULARY = 512, 2048
"""Rows and columns of a tile."""


class Head(NamedTuple):
    """Next-token distributions of M tokens, before they are computed."""

    hidden: Tensor
    """[M, H]."""
    weight: Tensor
    """[V, H]."""
    bias: Tensor | None
    """[V] or None."""
    temperature: float
    """Divides the logits."""
    softcap: float | None = None
    """Bound of the logits before the temperature, approached as by tanh; see `heads`."""


def reverse_kl(student: Head, teacher: Head) -> Tensor:
    """KL(student || teacher) of each token's whole distribution, in nats, [M], float32 (float64 for float64 inputs).

    On-policy distillation with the exact divergence: GKD, eq. 2 with the reverse KL, of
    https://arxiv.org/abs/2306.13649. Differentiable in the student's hidden states, weight and bias. If one
    vocabulary is longer (padding of the head), the distributions are those over the ids that both have.

    Raises:
        ValueError: the two have different numbers of tokens.
    """
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(f"reverse_kl: got {len(student.hidden)} and {len(teacher.hidden)} tokens, want as many.")
    kl: Tensor = _Full.apply(*student, *(_frozen(part) for part in teacher))  # type: ignore[no-untyped-call]
    return kl


def top_k_kl(student: Head, ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(student || teacher) over k tokens and one outcome for all others, in nats, [M].

    Never more than the whole divergence (lumping outcomes loses information), and equal to it if k is the vocabulary.

    Args:
        student: differentiable.
        ids: k different ids for every token, int64 [M, k].
        teacher_logprobs: the teacher's log-probabilities of them, [M, k].
    """
    kl: Tensor = _TopK.apply(*student, ids, teacher_logprobs)  # type: ignore[no-untyped-call]
    return kl


@torch.no_grad()
def top_logprobs(head: Head, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest ids of each token and their log-probabilities, likeliest first, [M, k] each."""
    log_z, _, _ = _statistics(head, None, None)
    best = log_z.new_full((len(log_z), k), -torch.inf)
    ids = torch.zeros((len(log_z), k), dtype=torch.int64, device=log_z.device)
    for rows, columns, x in _tiles(head, len(head.weight)):
        found = torch.cat([best[rows], x], 1).topk(k, 1)
        every = torch.cat([ids[rows], torch.arange(columns.start, columns.stop, device=x.device).expand_as(x)], 1)
        best[rows], ids[rows] = found.values, every.gather(1, found.indices)
    return ids, best - log_z[:, None]


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Any) -> Tensor:
        student, teacher = Head(*parts[:5]), Head(*parts[5:])
        log_p, log_q, mean = _statistics(student, teacher, None)
        kl: Tensor = mean - log_p + log_q
        _keep(ctx, student, (*teacher[:3], log_p, log_q, kl))
        ctx.teacher = teacher[3:]
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, (hidden, weight, bias, log_p, log_q, kl) = _kept(ctx)
        teacher = Head(hidden, weight, bias, *ctx.teacher)
        common = min(len(student.weight), len(teacher.weight))

        def pull(rows: slice, columns: slice, x: Tensor) -> Tensor:
            own = x - log_p[rows, None]
            other = _tile(teacher, rows, columns) - log_q[rows, None]
            pulled: Tensor = own.exp() * (own - other - kl[rows, None]) * grad[rows, None]
            return pulled

        return *_gradients(student, common, pull, ctx.needs_input_grad), *[None] * 7


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Any) -> Tensor:
        student, ids, other = Head(*parts[:5]), parts[5], parts[6]
        log_z, chosen, _ = _statistics(student, None, ids)
        own = chosen - log_z[:, None]
        tail, other_tail = (_log_rest(logs) for logs in (own, other.to(own.dtype)))
        ratio, tail_ratio = own - other.to(own.dtype), tail - other_tail
        kl: Tensor = (own.exp() * ratio).sum(1) + tail.exp() * tail_ratio
        _keep(ctx, student, (ids, log_z, own, ratio, tail_ratio, kl))
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, (ids, log_z, own, ratio, tail_ratio, kl) = _kept(ctx)
        extra = own.exp() * (ratio - tail_ratio[:, None]) * grad[:, None]

        def pull(rows: slice, columns: slice, x: Tensor) -> Tensor:
            g: Tensor = (x - log_z[rows, None]).exp() * ((tail_ratio - kl) * grad)[rows, None]
            at, here = _local(ids[rows], columns)
            return g.scatter_add_(1, at, extra[rows] * here)

        return *_gradients(student, len(student.weight), pull, ctx.needs_input_grad), *[None] * 4


# Tiles


def _exact(head: Head) -> torch.dtype:
    """What sums are made in."""
    return torch.float64 if head.hidden.dtype == torch.float64 else torch.float32


def _tile(head: Head, rows: slice, columns: slice) -> Tensor:
    """Scaled logits of some tokens and some of the vocabulary, in `_exact`."""
    hidden, weight = head.hidden[rows], head.weight[columns]
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        out = torch.mm(hidden, weight.to(hidden.dtype).t(), out_dtype=torch.float32)
    else:
        out = hidden.to(_exact(head)) @ weight.to(_exact(head)).t()
    if head.bias is not None:
        out += head.bias[columns]
    out = out if head.temperature == 1.0 else out.div_(head.temperature)
    return out if head.softcap is None else out.div_(_cap(head)).tanh_().mul_(_cap(head))


def _cap(head: Head) -> float:
    """The soft cap of the scaled logits."""
    return math.inf if head.softcap is None else head.softcap / head.temperature


def _tiles(head: Head, vocabulary: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, logits) of every tile; autocast must not round them."""
    with torch.autocast(head.hidden.device.type, enabled=False):
        for start in range(0, vocabulary, VOCABULARY):
            columns = slice(start, min(start + VOCABULARY, vocabulary))
            for first in range(0, len(head.hidden), TOKENS):
                rows = slice(first, min(first + TOKENS, len(head.hidden)))
                yield rows, columns, _tile(head, rows, columns)


def _statistics(head: Head, other: Head | None, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One sweep with online sums (https://arxiv.org/abs/1805.02867): the log-normaliser [M]; then with `other` its
    log-normaliser [M], with `ids` the logits at them [M, k]; and the mean under `head` of the difference to `other`'s
    logits [M]."""
    vocabulary = len(head.weight) if other is None else min(len(head.weight), len(other.weight))
    count, exact, device = len(head.hidden), _exact(head), head.hidden.device
    log_z, log_other = (torch.full((count,), -torch.inf, dtype=exact, device=device) for _ in range(2))
    mean = torch.zeros(count, dtype=exact, device=device)
    chosen = torch.zeros((count, 0 if ids is None else ids.shape[1]), dtype=exact, device=device)
    for rows, columns, x in _tiles(head, vocabulary):
        here = x.logsumexp(1)
        both = torch.logaddexp(log_z[rows], here)
        if other is not None:
            y = _tile(other, rows, columns).to(exact)
            inside = (torch.exp(x - both[:, None]) * (x - y)).sum(1)
            mean[rows] = mean[rows] * torch.exp(log_z[rows] - both) + inside
            log_other[rows] = torch.logaddexp(log_other[rows], y.logsumexp(1))
        if ids is not None:
            at, there = _local(ids[rows], columns)
            chosen[rows] = torch.where(there, x.gather(1, at), chosen[rows])
        log_z[rows] = both
    return log_z, chosen if other is None else log_other, mean


def _gradients(head: Head, vocabulary: int, pull: Any, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias from that of the scaled logits, `pull(rows, columns, logits)`."""
    exact = _exact(head)
    d_hidden = torch.zeros(head.hidden.shape, dtype=exact, device=head.hidden.device) if needs[0] else None
    d_weight = torch.zeros(head.weight.shape, dtype=exact, device=head.weight.device) if needs[1] else None
    d_bias = torch.zeros(len(head.weight), dtype=exact, device=head.weight.device) if needs[2] else None
    for rows, columns, x in _tiles(head, vocabulary):
        g = pull(rows, columns, x)
        g = g if head.softcap is None else g * (1 - (x / _cap(head)).square())
        g = g if head.temperature == 1.0 else g.div_(head.temperature)
        if d_hidden is not None:
            d_hidden[rows] += g @ head.weight[columns].to(exact)
        if d_weight is not None:
            d_weight[columns] += g.t() @ head.hidden[rows].to(exact)
        if d_bias is not None:
            d_bias[columns] += g.sum(0)
    like = (head.hidden, head.weight, head.bias)
    return tuple(
        None if g is None or t is None else g.to(t.dtype)
        for g, t in zip((d_hidden, d_weight, d_bias), like, strict=True)
    )


def _log_rest(logs: Tensor) -> Tensor:
    """Log of the probability that is left beside outcomes of these log-probabilities [M, k], as far as their type
    can tell it from 0, [M]."""
    return torch.log((1 - logs.exp().sum(1)).clamp(min=torch.finfo(logs.dtype).eps))


def _local(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Ids as columns of this tile (clamped), and whether they are in it."""
    at = ids - columns.start
    width = columns.stop - columns.start
    return at.clamp(0, width - 1), (at >= 0) & (at < width)


def _frozen(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


def _keep(ctx: Any, student: Head, others: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(*student[:3], *others)
    ctx.student = student[3:]


def _kept(ctx: Any) -> tuple[Head, tuple[Any, ...]]:
    hidden, weight, bias, *others = ctx.saved_tensors
    return Head(hidden, weight, bias, *ctx.student), tuple(others)
