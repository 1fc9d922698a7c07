"""A forward for small models of the Llama family on one CPU thread, in NumPy.

One step of a small model is a few hundred tiny operations. A call of transformers' module, or of a torch operator,
then costs more than what it computes; NumPy's calls are several times cheaper, and its BLAS is as fast. Prefill, the
next turn and decoding are one: new tokens of any rows, without padding. Weights are read when `refresh` is called.
`probing.probe` compares the result with the model's own logits before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llm_gym.policies.builtin.kv_cache import SlotCache

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Pre-norm RMSNorm, rotary embedding over whole heads, gated MLP with SiLU."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone, not on the longest one seen."""
WIDEST = 1024
"""Hidden size above which products take nearly all of the time, and torch's threads are worth more."""
QUERIES = 64
"""Most tokens of a row that attend together; the first of them compute scores for the last, in vain."""
SMALL = 1 << 18
"""Matrices of up to so many numbers are copied: a few rows times one that lies as [inputs, outputs] take OpenBLAS as
little as a quarter of the time that they take with a transposed one."""
Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (https://arxiv.org/abs/1910.07467) over the last dimension."""

    weight: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight."""
        scale = np.vecdot(x, x)
        scale /= x.shape[-1]
        scale += self.eps
        y: Array = x / np.sqrt(scale, out=scale)[..., None]
        y *= self.weight
        return y


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a weight matrix, already transposed to [inputs, outputs]."""

    weight: Array
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """x @ weight + bias."""
        y: Array = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y


@dataclass(frozen=True, slots=True)
class Layer:
    """Views of one decoder layer's weights."""

    before: Norm
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    out: Linear
    after: Norm
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that attend together, equally many of each of some neighbouring rows."""

    rows: slice
    tokens: slice
    """Where they stand among all that are fed, row by row."""
    span: int
    """How many tokens of a row they see at most."""


class Lean:
    """The forward of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self._cosine = self._sine = np.empty((0, 1, 1))
        self.refresh()

    @classmethod
    def of(cls, model: Any) -> Lean | None:
        """The forward of `model`, or None where it is of no use or not known to be right."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        known = type(model).__name__ in FAMILY and rope.get("rope_type", "default") in STATIC_ROPE
        if not known or config.hidden_act != "silu" or config.hidden_size > WIDEST:
            return None
        plain = all(not watched(module) for module in model.modules())
        kinds = {(parameter.dtype, parameter.device.type) for parameter in model.parameters()}
        exact = kinds in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")})
        return cls(model) if plain and exact and _linears_are_plain(model) else None

    @property
    def usable(self) -> bool:
        """Whether nothing happened to the model or to torch since that calls for the model's own forward."""
        return torch.get_num_threads() == 1 and not watched(self.model)

    def refresh(self) -> None:
        """Reads the weights, which have changed."""
        self.layers = [_layer(layer) for layer in self.decoder.layers]
        self.norm = _norm(self.decoder.norm)
        self.embedding = _array(self.decoder.embed_tokens.weight)
        self.head = _linear(self.model.get_output_embeddings())

    def __call__(
        self,
        rows: npt.NDArray[np.integer],
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        cache: SlotCache,
    ) -> Array:
        """Feeds new tokens to n rows; padding costs nothing, for it is left out.

        Args:
            rows: [n], ascending.
            ids: int64 [n, T], padded on the left.
            positions: int64 [n, T], where they stand in their rows; -1 for padding.
            cache: takes the new keys and values.

        Returns:
            The logits after the last column, [n, vocabulary].
        """
        fed = positions >= 0
        counts = fed.sum(axis=1)
        pieces = list(_pieces(rows, counts, positions[:, -1] + 1))
        place = np.repeat(rows, counts), slice(None), positions[fed]
        cosine, sine = self._angles(place[2], cache.length)
        unseen = [_unseen(piece, place[2], self.embedding.dtype) for piece in pieces]
        x: Array = self.embedding[ids[fed]]
        heads = (len(x), -1, cache.layout.key_dim)
        with np.errstate(over="ignore"):
            for layer, keys, values in zip(self.layers, cache.keys.numpy(), cache.values.numpy(), strict=True):
                h = layer.before(x)
                query, key = layer.query(h).reshape(heads), layer.key(h).reshape(heads)
                if layer.query_norm is not None and layer.key_norm is not None:
                    query, key = layer.query_norm(query), layer.key_norm(key)
                keys[place] = rotate(key, cosine, sine)
                values[place] = layer.value(h).reshape(heads)
                query = rotate(query, cosine, sine)
                query *= query.shape[-1] ** -0.5
                mixed = [
                    _attend(query[p.tokens], keys[p.rows, :, : p.span], values[p.rows, :, : p.span], mask)
                    for p, mask in zip(pieces, unseen, strict=True)
                ]
                x += layer.out(mixed[0] if len(mixed) == 1 else np.concatenate(mixed))
                h = layer.after(x)
                gate = layer.gate(h)
                gate /= np.exp(-gate) + 1.0
                gate *= layer.up(h)
                x += layer.down(gate)
        return self.head(self.norm(x if len(x) == len(rows) else x[counts.cumsum() - 1]))

    def _angles(self, positions: npt.NDArray[np.int64], length: int) -> tuple[Array, Array]:
        """Cosines and sines [n, 1, dim] of the positions; the sines of the first half are negated (see `rotate`)."""
        if len(self._cosine) < length:
            like = self.decoder.embed_tokens.weight
            cosine, sine = self.decoder.rotary_emb(like, torch.arange(length)[None])
            sine[..., : sine.shape[-1] // 2].neg_()
            self._cosine, self._sine = cosine[0, :, None].numpy(), sine[0, :, None].numpy()
        return self._cosine[positions], self._sine[positions]


def watched(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into or comes out of `module`."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of x [n, heads, dim], halves paired as in transformers."""
    y: Array = x * cosine
    halves = x.reshape(*x.shape[:-1], 2, -1)[..., ::-1, :]
    y += (halves * sine.reshape(len(x), 1, 2, -1)).reshape(x.shape)
    return y


def _pieces(
    rows: npt.NDArray[np.integer], counts: npt.NDArray[np.integer], ends: npt.NDArray[np.integer]
) -> Iterator[Piece]:
    """What attends together: neighbouring rows that get one token each; else up to `QUERIES` tokens of a row.

    Args:
        rows: [n], ascending.
        counts: [n], how many tokens each row gets.
        ends: [n], how many it then has.
    """
    if counts.max() == 1 and rows[-1] - rows[0] == len(rows) - 1:
        yield Piece(slice(int(rows[0]), int(rows[-1]) + 1), slice(0, len(rows)), int(ends.max()))
        return
    breaks = np.flatnonzero((counts[1:] != 1) | (counts[:-1] != 1) | (np.diff(rows) != 1)) + 1
    first = 0
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        end = int(ends[start:stop].max())
        for left in range(int(counts[start]), 0, -QUERIES):
            fed = min(QUERIES, left) * (stop - start)
            piece = slice(int(rows[start]), int(rows[stop - 1]) + 1), slice(first, first + fed)
            yield Piece(*piece, end - max(0, left - QUERIES))
            first += fed


def _unseen(piece: Piece, positions: npt.NDArray[np.int64], dtype: Any) -> Array:
    """What a piece adds to its scores, [rows, 1, 1, T, span]: tokens see what stands before them, and themselves."""
    last = positions[piece.tokens].reshape(piece.rows.stop - piece.rows.start, 1, 1, -1, 1)
    return np.where(np.arange(piece.span) > last, -np.inf, 0.0).astype(dtype)


def _attend(query: Array, keys: Array, values: Array, unseen: Array) -> Array:
    """Grouped-query attention of T new tokens of each row: query [n * T, heads, dim], keys [n, kept, L, dim]."""
    count, kept, span, dim = keys.shape
    folded = query.reshape(count, -1, kept, query.shape[1] // kept, dim).transpose(0, 2, 3, 1, 4)
    scores: Array = folded.reshape(count, kept, -1, dim) @ keys.swapaxes(2, 3)
    scores.reshape(*folded.shape[:4], span)[:] += unseen
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    mixed: Array = (scores @ values).reshape(folded.shape)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(len(query), -1)


def _linears_are_plain(model: Any) -> bool:
    """Whether no layer that multiplies by a matrix does anything else, such as an adapter."""
    found = [m for name, m in model.get_decoder().named_modules() if name.endswith("_proj")]
    return all(type(linear) is nn.Linear for linear in [*found, model.get_output_embeddings()])


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


def _linear(module: Any) -> Linear:
    weight = _array(module.weight).T
    if weight.size <= SMALL:
        weight = np.ascontiguousarray(weight)
    return Linear(weight, None if module.bias is None else _array(module.bias))


def _norm(module: Any) -> Norm:
    return Norm(_array(module.weight), module.variance_epsilon)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        before=_norm(layer.input_layernorm),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=_linear(attention.o_proj),
        after=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )
