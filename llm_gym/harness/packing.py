"""Attention over packed rows: many sequences end to end in one row of tokens, none seeing another.

Linear layers and norms read the packed row as it is. Only inside attention are queries, keys and values
laid out as [sequences, longest], run through causal SDPA (which has kernels everywhere, unlike
variable-length attention) and laid back. Padding sits on the right, so that no real query sees it.

The layout reaches every layer as the keyword argument `layout` of the model's forward. Transformers
drops unknown arguments silently, so two things prove that it arrived: each layer adds to `Layout.seen`,
and the attention mask passed along with it is NaN, which poisons the output of any layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
class Block:
    """Consecutive sequences that are padded together."""

    tokens: int
    """Real tokens, n."""
    sequences: int
    width: int
    """Longest sequence."""
    index: Tensor | None
    """Where each real token sits in [sequences * width], int64 [n]; None if nothing is padded."""

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
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Layout:
        """The layout of sequences of these lengths, in order; fewest padded tokens if sorted by length."""
        return cls(tuple(_block(part, device) for part in _runs(lengths)))


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
    streams = zip(*(torch.split(x[0].transpose(0, 1), sizes) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outs = []
    for block, (q, k, v) in zip(layout.blocks, streams, strict=True):
        padded = (block.pad(q), block.pad(k), block.pad(v))
        outs.append(
            block.unpad(scaled_dot_product_attention(*padded, is_causal=True, scale=scaling, enable_gqa=grouped))
        )
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).unsqueeze(0), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a layout, masks are made as for `sdpa`
