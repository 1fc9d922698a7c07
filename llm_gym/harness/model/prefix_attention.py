"""Attention over a forest of pieces, computed in parts that are merged by their log-sum-exp.

A query of a piece sees its own piece up to itself, and all of the pieces above it. Softmax attention over keys A and B
together is the mean of the two apart, weighted by their denominators (https://arxiv.org/abs/2501.01005, section 2.2):

    lse = logaddexp(lse_A, lse_B),    out = exp(lse_A - lse) * out_A + exp(lse_B - lse) * out_B

So each piece attends to itself, causally; then, for each depth of the forest, all that goes on from a piece (one span
of the row, for pieces stand in depth-first order) attends to it, without any mask. Backward, a flash kernel recomputes
the probabilities of a part as exp(score - lse): given the merged `lse` and `out`, the kernel's gradient of each part is
that part's share of the whole gradient, and the shares are summed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from llm_gym.harness.model.flash import CPUFlash, CUDAFlash, Kernel

log = logging.getLogger(__name__)

Span = tuple[int, int]
"""Start and end in the packed row."""
SPREAD = 0.75
"""Short spans share a padded kernel call while none is shorter than this fraction of the longest."""
ALONE = 32
"""Spans of so many queries are cheaper read as views of the row, one call each, than copied into a padded block."""


class Part(NamedTuple):
    """Queries of one span over keys of one span; the same span if causal."""

    queries: Span
    keys: Span


def parts(lengths: Sequence[int], parents: Sequence[int] = ()) -> list[list[Part]]:
    """What attends to what: first every piece to itself, causally; then for each depth what goes on to its piece.

    The queries of one list are disjoint.

    Args:
        lengths: tokens of each piece, in depth-first order.
        parents: the piece that each goes on from, or -1. Empty: all -1.

    Raises:
        ValueError: the pieces are not in depth-first order.
    """
    parents = parents or [-1] * len(lengths)
    spans, depths, path = [], [], list[int]()
    start = 0
    for piece, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(f"pieces: number {piece} goes on from number {parent}, which is not above the one before.")
        spans.append((start, start + length))
        depths.append(len(path))
        path.append(piece)
        start += length
    ends = [end for _, end in spans]
    for piece in reversed(range(len(spans))):
        if parents[piece] >= 0:
            ends[parents[piece]] = max(ends[parents[piece]], ends[piece])
    below: list[list[Part]] = [[] for _ in range(max(depths, default=0))]
    for (first, last), end, depth in zip(spans, ends, depths, strict=True):
        if end > last:
            below[depth].append(Part((last, end), (first, last)))
    return [[Part(span, span) for span in spans], *below]


# --- where a call's tokens stand ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans of a row as [sequences, width]: a view where they lie so, else copied and padded with zeros."""

    sequences: int
    width: int
    place: slice | Tensor
    """Of their tokens in the row."""
    index: Tensor | None
    """Of their tokens in [sequences * width]; None if nothing is padded."""

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device | str) -> Spans:
        """Each span as one sequence."""
        sizes = [end - start for start, end in spans]
        width = max(sizes)
        index = None
        if min(sizes) < width:
            index = torch.cat([torch.arange(n) + i * width for i, n in enumerate(sizes)]).to(device)
        return cls(len(spans), width, _place(spans, device), index)

    @classmethod
    def flat(cls, spans: Sequence[Span], device: torch.device | str) -> Spans:
        """All of them as one sequence."""
        return cls(1, sum(end - start for start, end in spans), _place(spans, device), None)

    def read(self, x: Tensor) -> Tensor:
        """x [N, H, D] -> [sequences, H, width, D]."""
        rows = x[self.place] if isinstance(self.place, slice) else x.index_select(0, self.place)
        if self.index is not None:
            rows = x.new_zeros(self.sequences * self.width, *x.shape[1:]).index_copy_(0, self.index, rows)
        return rows.view(self.sequences, self.width, *x.shape[1:]).transpose(1, 2)

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.transpose(1, 2).flatten(0, 1)
        return rows if self.index is None else rows.index_select(0, self.index)

    def put(self, x: Tensor, values: Tensor) -> None:
        """x [N, H, D] at the spans = values [sequences, H, width, D]."""
        x[self.place] = self._rows(values)

    def add(self, x: Tensor, values: Tensor) -> None:
        """x [N, H, D] at the spans += values [sequences, H, width, D]."""
        if isinstance(self.place, slice):
            x[self.place] += self._rows(values)
        else:
            x.index_add_(0, self.place, self._rows(values))


def _place(spans: Sequence[Span], device: torch.device | str) -> slice | Tensor:
    if all(before[1] == after[0] for before, after in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in spans]).to(device)


# --- calls --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a kernel; the first calls, the causal ones, cover every token once."""

    queries: Spans
    keys: Spans
    causal: bool
    kernel: Kernel


def calls(lengths: Sequence[int], parents: Sequence[int], device: torch.device) -> tuple[Call, ...]:
    """The kernel calls of a packed row (see `parts`).

    Raises:
        RuntimeError: the device is not in `PLANS`.
        ValueError: the pieces are not in depth-first order.
    """
    plan = PLANS.get(device.type)
    if plan is None:
        raise RuntimeError(f"no kernel for {device.type}")
    return tuple(call for i, level in enumerate(parts(lengths, parents)) for call in plan(level, i == 0, device))


def _cpu_calls(level: Sequence[Part], causal: bool, device: torch.device) -> Iterator[Call]:
    """Long parts alone, or with neighbours of their size, as views of the row; short ones of like size together."""
    short = [part for part in level if _sizes(part)[1] < ALONE]
    short.sort(key=lambda part: tuple(-n for n in _sizes(part)))
    runs = _runs([part for part in level if _sizes(part)[1] >= ALONE], lambda run, part: _neighbours(run[-1], part))
    for run in [*runs, *_runs(short, lambda run, part: _alike(run[0], part, causal))]:
        queries, keys = (Spans.of(spans, device) for spans in zip(*sorted(run), strict=True))
        yield Call(queries, keys, causal, CPUFlash(causal))


def _runs(level: Sequence[Part], fits: Callable[[list[Part], Part], bool]) -> list[list[Part]]:
    """Consecutive parts, as many as fit together."""
    runs: list[list[Part]] = []
    for part in level:
        if runs and fits(runs[-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _length(span: Span) -> int:
    return span[1] - span[0]


def _sizes(part: Part) -> tuple[int, int]:
    """Keys and queries."""
    return _length(part.keys), _length(part.queries)


def _neighbours(last: Part, part: Part) -> bool:
    return _sizes(last) == _sizes(part) and (last.queries[1], last.keys[1]) == (part.queries[0], part.keys[0])


def _alike(first: Part, part: Part, causal: bool) -> bool:
    """Keys cannot be padded without a mask, unless queries are causal."""
    (most_keys, most), (keys, queries) = _sizes(first), _sizes(part)
    return queries >= SPREAD * most and (causal or keys == most_keys)


def cuda_calls(level: Sequence[Part], causal: bool, device: torch.device) -> Iterator[Call]:
    """One call of the variable-length kernel for all parts of a level."""
    queries, keys = (Spans.flat(spans, device) for spans in zip(*level, strict=True))
    sizes = [(_length(part.queries), _length(part.keys)) for part in level]
    yield Call(queries, keys, causal, CUDAFlash.of(sizes, causal, device))


PLANS: dict[str, Callable[[Sequence[Part], bool, torch.device], Iterator[Call]]] = {
    "cpu": _cpu_calls,
    "cuda": cuda_calls,
}
"""Device type -> the calls of one list of `parts`."""


class Merged(torch.autograd.Function):
    """Attention by these calls; q [N, H, D], k and v [N, G, D] -> [N, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Call], scale: float) -> Tensor:
        """Merges the calls of the plan in their order."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(*q.shape[:2], 1, dtype=exact, device=q.device)
        for call in plan:
            o, e = call.kernel.forward(call.queries.read(q), call.keys.read(k), call.keys.read(v), scale)
            if not call.causal:
                before, o_before = call.queries.read(lse), call.queries.read(out)
                e, part = torch.logaddexp(before, e), e
                o = (o * (part - e).exp_()).addcmul(o_before, (before - e).exp_()).to(out.dtype)
            call.queries.put(out, o)
            call.queries.put(lse, e)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each call's gradients from the merged output and log-sum-exp, added up."""
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for call in ctx.plan:
            own, seen = call.queries, call.keys
            grads = call.kernel.backward(
                own.read(grad), own.read(q), seen.read(k), seen.read(v), own.read(out), own.read(lse), ctx.scale
            )
            for spans, total, part in zip((own, seen, seen), (dq, dk, dv), grads, strict=True):
                (spans.put if call.causal else spans.add)(total, part)
        return dq, dk, dv, None, None


def merged_attention(query: Tensor, key: Tensor, value: Tensor, plan: Sequence[Call], scale: float | None) -> Tensor:
    """Attention of a packed row.

    Args:
        query: [1, H, N, D].
        key: [1, G, N, D], G dividing H.
        value: as `key`.
        plan: from `calls`.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        [1, N, H, D].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Tensor = Merged.apply(q, k, v, plan, scale)  # type: ignore[no-untyped-call]
    return out.unsqueeze(0)


# --- whether it works here ----------------------------------------------------------------------------------


def works(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether kernels for tensors of this kind are there and right; tried out once for each kind."""
    return tried(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])


@lru_cache
def tried(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int, value_size: int) -> bool:
    """What `works` has found out, once for tensors of a kind."""
    as_it_is = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # checkpointing would count them
    try:
        with torch.autocast(device.type, enabled=False), torch.enable_grad(), as_it_is:
            gap = _gap(device, dtype, (heads, groups, groups), (size, size, value_size))
    except RuntimeError as error:  # no kernel on this device, or none for this kind of tensors
        why = str(error).splitlines()[0]
    else:
        if gap < (1e-4 if dtype in (torch.float32, torch.float64) else 3e-2):
            return True
        why = f"off by {gap:.1e}"
    log.warning("attention: the merge does not work for %s heads of %s in %s on %s (%s); keys are concatenated.",
                heads, size, dtype, device.type, why)  # fmt: skip
    return False


def _gap(device: torch.device, dtype: torch.dtype, heads: Sequence[int], sizes: Sequence[int]) -> float:
    """Largest relative error of the output and the three gradients on a small forest, against a dense mask."""
    lengths, parents = (5, 3, 2, 1, 4, 3), (-1, 0, 1, 1, 0, -1)
    n = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, h, d, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
        for h, d in zip(heads, sizes, strict=True)
    )
    got = merged_attention(q, k, v, calls(lengths, parents, device), None)
    weight = torch.randn(got.shape, generator=generator).to(got)
    found = [got, *torch.autograd.grad(got, (q, k, v), weight)]
    mask = torch.eye(n, dtype=torch.bool)
    for level in parts(lengths, parents):
        for part in level:
            mask[slice(*part.queries), slice(*part.keys)] = True
    mask = mask.tril().to(device)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ke, ve = (x.repeat_interleave(heads[0] // heads[1], 1) for x in exact[1:])
    scores = (exact[0] @ ke.mT * sizes[0] ** -0.5).masked_fill(~mask, -torch.inf)
    want = (scores.softmax(-1) @ ve).transpose(1, 2)
    wanted = [want, *torch.autograd.grad(want, exact, weight.double())]
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, wanted, strict=True))
