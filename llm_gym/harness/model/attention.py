"""Attention over packed rows: many sequences end to end in one row of tokens, none seeing another.

Linear layers and norms read the packed row as it is. What several sequences begin with stands in the row once, as a
piece that they go on from; pieces stand in depth-first order. Attention has two forms, the same to rounding:

- `merge`: flash kernels for each piece and for what goes on from it, merged (see `prefix_attention`). Needs a
  kernel that works, and beginnings long enough to be worth its calls (see `SHORT`).
- `cat`: queries, keys and values laid out as [sequences, longest] and run through SDPA, which has kernels
  everywhere; a sequence's keys are those of the pieces before it and its own, concatenated. Padding sits on the
  right, so that no real query sees it.

The layout reaches every layer as the keyword argument `layout` of the model's forward. Transformers
drops unknown arguments silently, so two things prove that it arrived: each layer leaves its name in `Layout.seen`,
and the attention mask passed along with it is NaN, which poisons the output of any layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llm_gym.harness.model.prefix_attention import SPREAD, Call, calls, merged_attention, works

NAME = "llm_gym"
"""The attention implementation's name in transformers."""
Form = Literal["auto", "merge", "cat"]
SHORT = 48
"""Mean tokens before a piece below which, on a CPU, `cat` copies less than the calls of `merge` cost."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The pieces before the sequences of a block, from the root on."""

    index: Tensor
    """Where in the packed row their tokens stand, int64 [sequences, longest]; 0 where a prefix is shorter."""
    mask: Tensor
    """True where a query may look: bool [sequences or 1, 1, width, longest + width]."""

    def before(self, stream: Tensor, own: Tensor) -> Tensor:
        """The prefixes' keys (or values) from the whole row [N, H, D], in front of the own [sequences, H, width, D]."""
        sequences, longest = self.index.shape
        read = stream.index_select(0, self.index.flatten()).view(sequences, longest, *stream.shape[1:])
        return torch.cat([read.transpose(1, 2), own], 2)


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences that are padded together."""

    tokens: int
    """Real tokens, n."""
    sequences: int
    width: int
    """Longest sequence."""
    index: Tensor | None
    """Where each real token sits in [sequences * width], int64 [n]; None if nothing is padded."""
    prefix: Prefix | None = None
    """What comes before the sequences; None: nothing, and attention is plainly causal."""

    def pad(self, x: Tensor) -> Tensor:
        """[n, H, D] -> [sequences, H, width, D]."""
        if self.index is not None:
            x = _Spread.apply(x, self.index, self.sequences * self.width)  # type: ignore[no-untyped-call]
        return x.view(self.sequences, self.width, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[sequences, H, width, D] -> [n, H, D]."""
        x = x.transpose(1, 2).flatten(0, 1)
        if self.index is not None:
            x = _Pick.apply(x, self.index)  # type: ignore[no-untyped-call]
        return x


@dataclass
class Layout:
    """How a packed row is divided."""

    lengths: tuple[int, ...]
    """Tokens of each piece; depth-first order."""
    parents: tuple[int, ...]
    """The piece that each goes on from, or -1."""
    device: torch.device
    form: Form = "auto"
    """How attention is to be computed; where no kernel works, always `cat`."""
    seen: set[int] = field(default_factory=set)
    """Attention layers that have read this layout; reading it again, as checkpointing does, changes nothing."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        parents: Sequence[int] = (),
        form: Form = "auto",
    ) -> Layout:
        """The layout of pieces of these lengths; `parents` empty: all -1."""
        return cls(tuple(lengths), tuple(parents) or (-1,) * len(lengths), torch.device(device), form)

    @cached_property
    def merges(self) -> bool:
        """Whether the form is `merge`; decided by numbers of tokens alone, so that a run can be repeated."""
        if self.form != "auto" or self.device.type != "cpu":
            return self.form != "cat"
        before: list[int] = []
        for parent in self.parents:
            before.append(before[parent] + self.lengths[parent] if parent >= 0 else 0)
        return sum(before) >= SHORT * sum(parent >= 0 for parent in self.parents)

    @cached_property
    def plan(self) -> tuple[Call, ...]:
        """The merge's kernel calls."""
        return calls(self.lengths, self.parents, self.device)

    @cached_property
    def order(self) -> list[int]:
        """The pieces as `blocks` divides them: those with nothing before them first; each kind longest first."""
        return sorted(range(len(self.lengths)), key=lambda i: (self.parents[i] >= 0, -self.lengths[i]))

    @cached_property
    def starts(self) -> list[int]:
        """Where each piece begins in the row."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    @cached_property
    def moved(self) -> Tensor | None:
        """Where in the row the tokens of `order` stand, int64 [N]; None if they stand so already."""
        if self.order == list(range(len(self.lengths))):
            return None
        return torch.cat([self._span(piece) for piece in self.order]).to(self.device)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The padded blocks of `cat`, in `order`."""
        roots = [i for i in self.order if self.parents[i] < 0]
        blocks, done = [], 0
        for pieces in (roots, self.order[len(roots) :]):
            for part in _runs([self.lengths[i] for i in pieces]):
                block = _block(part, self.device)
                chosen = self.order[done : done + len(part)]
                blocks.append(block if pieces is roots else replace(block, prefix=self._prefix(chosen, part)))
                done += len(part)
        return tuple(blocks)

    def _span(self, piece: int) -> Tensor:
        return torch.arange(self.starts[piece], self.starts[piece] + self.lengths[piece])

    def _before(self, piece: int) -> Tensor:
        """Where the tokens before a piece stand, from the root on."""
        path, parent = [torch.arange(0)], self.parents[piece]
        while parent >= 0:
            path.append(self._span(parent))
            parent = self.parents[parent]
        return torch.cat(path[::-1])

    def _prefix(self, pieces: Sequence[int], own: Sequence[int]) -> Prefix:
        """What stands before these pieces, of lengths `own`."""
        before = [self._before(piece) for piece in pieces]
        index = torch.nn.utils.rnn.pad_sequence(before, batch_first=True)
        real = torch.arange(index.shape[1]) < torch.tensor([len(places) for places in before])[:, None]
        if real.all():
            real = real[:1]
        n, width = len(real), max(own)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        seen = [real[:, None, None].expand(n, 1, width, index.shape[1]), causal.expand(n, 1, width, width)]
        return Prefix(index.to(self.device), torch.cat(seen, -1).to(self.device))


def _runs(lengths: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for length in lengths:
        if run and not SPREAD <= length / run[0] <= 1:
            yield run
            run = []
        run.append(length)
    if run:
        yield run


def _block(lengths: Sequence[int], device: torch.device | str) -> Block:
    width = max(lengths)
    index = None
    if min(lengths) != width:
        index = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)]).to(device)
    return Block(sum(lengths), len(lengths), width, index)


class _Spread(torch.autograd.Function):
    """x [n, ...] -> zeros [size, ...] with x at `index`; index has no repeats, so backward is a plain read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class _Pick(torch.autograd.Function):
    """x [size, ...] -> x at `index` [n, ...]; the inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, index, grad), None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: packed if a layout is given, its own `sdpa` otherwise.

    Args:
        module: the attention layer.
        query: [1, heads, N, D] of a packed row.
        key: [1, key-value heads, N, D].
        value: as `key`.
        attention_mask: ignored when packed (causal in each sequence).
        dropout: never applied when packed: old and new log-probabilities must be of one function.
        scaling: of the scores.
        layout: how the row is divided, or None.
        **kwargs: what transformers passes besides; read by `sdpa` only.

    Returns:
        ([1, N, heads, D], None).

    Raises:
        RuntimeError: the layer wants something that packed attention does not do.
    """
    if layout is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise RuntimeError(f"packing: attention with {name!r} cannot be packed.")
    layout.seen.add(id(module))
    query, key, value = (_cast(x) for x in (query, key, value))
    if layout.merges and works(query, key, value):
        return merged_attention(query, key, value, layout.plan, scaling), None
    return concatenated(query, key, value, layout, scaling), None


def _cast(x: Tensor) -> Tensor:
    """In autocast's type, if it is on: it casts for SDPA, but not for the kernels under it."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if on else x


def concatenated(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """The form `cat`; shapes as in `attention`."""
    sizes = [block.tokens for block in layout.blocks]
    streams = [x[0].transpose(0, 1) for x in (query, key, value)]
    ordered = streams if layout.moved is None else [_Pick.apply(x, layout.moved) for x in streams]  # type: ignore[no-untyped-call]
    how: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    outs = []
    for block, parts in zip(layout.blocks, zip(*(torch.split(x, sizes) for x in ordered), strict=True), strict=True):
        q, k, v = (block.pad(part) for part in parts)
        if block.prefix is None:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, **how)
        else:
            k, v = block.prefix.before(streams[1], k), block.prefix.before(streams[2], v)
            out = scaled_dot_product_attention(q, k, v, attn_mask=block.prefix.mask, **how)
        outs.append(block.unpad(out))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if layout.moved is not None:
        out = _Spread.apply(out, layout.moved, len(out))  # type: ignore[no-untyped-call]
    return out.unsqueeze(0)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a layout, masks are made as for `sdpa`
