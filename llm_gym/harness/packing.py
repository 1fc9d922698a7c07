"""Attention over packed rows: many sequences end to end in one row of tokens, none seeing another.

Linear layers and norms read the packed row as it is. Only inside attention are queries, keys and values
laid out as [sequences, longest], run through causal SDPA (which has kernels everywhere, unlike
variable-length attention) and laid back. Padding sits on the right, so that no real query sees it.
A prompt that several sequences share stands in the row once; their keys are its keys and their own.

The layout reaches every layer as the keyword argument `layout` of the model's forward. Transformers
drops unknown arguments silently, so two things prove that it arrived: each layer adds to `Layout.seen`,
and the attention mask passed along with it is NaN, which poisons the output of any layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "llm_gym"
"""The attention implementation's name in transformers."""
SPREAD = 0.75
"""Sequences share a padded block while none is shorter than this fraction of the block's first."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The shared pieces that the sequences of a block go on from."""

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
    """Consecutive sequences that are padded together."""

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


@dataclass(slots=True)
class Layout:
    """How a packed row is divided."""

    blocks: tuple[Block, ...]
    seen: int = field(default=0)
    """Attention layers that have read this layout."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu", parents: Sequence[int] = ()) -> Layout:
        """The layout of pieces of these lengths, in order; fewest padded tokens if sorted by length.

        Args:
            lengths: tokens of each piece.
            device: where the row is.
            parents: for each piece the one it goes on from, or -1; those with -1 first. Empty: all -1.
        """
        roots = sum(parent < 0 for parent in parents) if parents else len(lengths)
        blocks = [_block(part, device) for part in _runs(lengths[:roots])]
        done = roots
        for part in _runs(lengths[roots:]):
            prefix = _prefix(lengths, parents[done : done + len(part)], part, device)
            blocks.append(replace(_block(part, device), prefix=prefix))
            done += len(part)
        return cls(tuple(blocks))


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


def _prefix(lengths: Sequence[int], parents: Sequence[int], own: Sequence[int], device: torch.device | str) -> Prefix:
    """The prefixes of sequences of lengths `own`, which go on from the pieces `parents`."""
    starts = torch.tensor([sum(lengths[:parent]) for parent in parents])[:, None]
    sizes = torch.tensor([lengths[parent] for parent in parents])[:, None]
    place = torch.arange(int(sizes.max()))
    real, width = place < sizes, max(own)
    if real.all():
        real = real[:1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    n = len(real)
    seen = [real[:, None, None].expand(n, 1, width, len(place)), causal.expand(n, 1, width, width)]
    return Prefix(torch.where(place < sizes, starts + place, 0).to(device), torch.cat(seen, -1).to(device))


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
        attention_mask: ignored when packed (causal within each sequence).
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
    layout.seen += 1
    sizes = [block.tokens for block in layout.blocks]
    streams = [x[0].transpose(0, 1) for x in (query, key, value)]
    how: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    outs = []
    for block, parts in zip(layout.blocks, zip(*(torch.split(x, sizes) for x in streams), strict=True), strict=True):
        q, k, v = (block.pad(part) for part in parts)
        if block.prefix is None:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, **how)
        else:
            k, v = block.prefix.before(streams[1], k), block.prefix.before(streams[2], v)
            out = scaled_dot_product_attention(q, k, v, attn_mask=block.prefix.mask, **how)
        outs.append(block.unpad(out))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).unsqueeze(0), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a layout, masks are made as for `sdpa`
