"""The key-value cache of the built-in engine, and the attention that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from llm_gym.errors import SettingError

ATTENTION = "llm_gym_slots"
"""Name of `attend` in the table of attention implementations of transformers."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What one cached token consists of."""

    layers: int
    heads: int
    """Key-value heads."""
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes, all layers together; 1 where nothing is cached, for ids are kept."""
        return max(1, self.layers * self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize)


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of many sequences, one row each, in two buffers [layers, rows + 1, heads, length, dim].

    One kind of forward serves prefill, the next turn and decoding: `aim` says which rows are fed and at which
    positions; `update` (which each attention layer calls) writes there and returns the rows' keys and values.
    The extra row takes what padding writes; nothing reads it.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layers=[])
        self.layout, self.rows, self.length = layout, 0, 0
        self._allocate()

    def __len__(self) -> int:
        return self.layout.layers

    def _allocate(self) -> None:
        a = self.layout
        shape = (a.layers, self.rows + 1, a.heads, self.length)
        # Zeros, for what a mask hides must still be finite: 0 * NaN is NaN.
        self.keys = torch.zeros(*shape, a.key_dim, dtype=a.dtype, device=a.device)
        self.values = torch.zeros(*shape, a.value_dim, dtype=a.dtype, device=a.device)

    def resize(self, rows: int, length: int) -> None:
        """Changes the number of rows and their length, keeping what fits."""
        keys, values = self.keys, self.values
        n, t = min(rows, self.rows), min(length, self.length)
        self.rows, self.length = rows, length
        self._allocate()
        self.keys[:, :n, :, :t] = keys[:, :n, :, :t]
        self.values[:, :n, :, :t] = values[:, :n, :, :t]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one row to another."""
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :length] = buffer[:, source, :, :length]

    def swap(self, a: int, b: int, length_a: int, length_b: int) -> None:
        """Exchanges two rows that hold `length_a` and `length_b` tokens."""
        for buffer in (self.keys, self.values):
            kept = buffer[:, a, :, :length_a].clone()
            buffer[:, a, :, :length_b] = buffer[:, b, :, :length_b]
            buffer[:, b, :, :length_a] = kept

    def aim(self, rows: slice | npt.NDArray[np.integer], positions: npt.NDArray[np.int64]) -> None:
        """Says where the next forward writes and reads.

        Args:
            rows: the n rows that are fed; a slice is read without a copy.
            positions: int64 [n, T], the position of each new token; -1 for padding.
        """
        index = np.arange(self.rows)[rows] if isinstance(rows, slice) else rows
        row = np.where(positions >= 0, index[:, None], self.rows)
        place = (row[:, None] * self.layout.heads + np.arange(self.layout.heads)[:, None]) * self.length
        place = place + np.maximum(positions, 0)[:, None]
        device = self.layout.device
        self._place = torch.from_numpy(place.reshape(-1)).to(device)
        self._rows = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(device)
        self._span = int(positions.max()) + 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values ([n, heads, T, dim]) of a layer; returns the rows' ([n, heads, span, dim])."""
        read = []
        for buffer, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            dim = buffer.shape[-1]
            buffer.view(-1, dim).index_copy_(0, self._place, new.to(buffer.dtype).reshape(-1, dim))
            read.append(buffer[self._rows, :, : self._span])
        return read[0], read[1]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention without repeating keys and values: a group's query heads become query positions.

    Args:
        module: the attention layer; not used.
        query: [n, heads, T, dim].
        key: [n, key-value heads, L, dim].
        value: [n, key-value heads, L, value dim].
        attention_mask: additive [n, 1, T, L].
        scaling: multiplies the scores.
        sliding_window: a token sees so many, itself included; None: all.
        softcap: bound of the scores (Gemma 2, https://arxiv.org/abs/2408.00118).
        s_aux: [heads], scores of a token that has no value (attention sinks, https://arxiv.org/abs/2309.17453).
        **kwargs: refused where they would change the result.

    Returns:
        [n, T, heads, value dim], and no attention weights.
    """
    if kwargs.get("position_bias") is not None:
        raise SettingError("policy: the built-in engine cannot serve a model whose attention uses 'position_bias'.")
    rows, heads, new, _ = query.shape
    groups = heads // key.shape[1]
    if sliding_window is not None and attention_mask is not None:
        attention_mask = windowed(attention_mask, sliding_window)
    plain = softcap is None and s_aux is None
    on_one_thread = key.device.type == "cpu" and torch.get_num_threads() == 1 and not torch.is_grad_enabled()
    if plain and on_one_thread and new == 1 and attention_mask is not None and key.dtype in _EXACT:
        return _attend_once(query.to(key.dtype), key, value, attention_mask, scaling).to(query.dtype), None
    if attention_mask is not None and new > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    folded = query.to(key.dtype).reshape(rows, key.shape[1], groups * new, -1)
    if plain:
        mixed = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.view(1, -1, groups, 1, 1).expand(rows, -1, -1, new, 1)
        mixed = _attend_plainly(folded, key, value, attention_mask, scaling, softcap, sinks)
    return mixed.reshape(rows, heads, new, -1).transpose(1, 2).contiguous().to(query.dtype), None


def windowed(mask: Tensor, window: int) -> Tensor:
    """An additive mask [n, 1, T, L] that also hides what stands `window` tokens or more before the last one seen."""
    if mask.shape[-1] <= window:
        return mask
    columns = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask == 0, columns, 0).amax(-1, keepdim=True)
    return mask.masked_fill(columns <= last - window, -torch.inf)


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention step by step, for what kernels do not do; softmax in float32, as transformers computes it."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        weights = scores.to(exact).softmax(-1)
    else:
        sink = sinks.reshape(*scores.shape[:-1], 1).to(exact)
        weights = torch.cat([scores.to(exact), sink], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


_EXACT = (torch.float32, torch.float64)


def _attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """One new token of each row, [n, 1, heads, value dim], on one thread of a CPU.

    A row's products are tiny, and NumPy's BLAS takes less than half of MKL's time for them (on an AMD processor).
    """
    rows, heads, _, dim = query.shape
    scale = dim**-0.5 if scaling is None else scaling
    folded = query.reshape(rows, key.shape[1], -1, dim) * scale
    scores = torch.from_numpy(np.matmul(folded.numpy(), key.numpy().swapaxes(2, 3)))
    weights = scores.add_(mask).softmax(-1)
    return torch.from_numpy(np.matmul(weights.numpy(), value.numpy())).view(rows, 1, heads, -1)


AttentionInterface.register(ATTENTION, attend)


@contextmanager
def attention(model: nn.Module, name: str) -> Iterator[None]:
    """`model` with another attention implementation; its own comes back at the end.

    The learner shares the module, and its choice must not change. Models whose layers are made for one implementation
    (BLOOM, Falcon) keep it: only their masks would be another's.
    """
    config: Any = model.config
    before = config._attn_implementation
    if not getattr(model, "_can_set_attn_implementation", lambda: True)():
        yield
        return
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
