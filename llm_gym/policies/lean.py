"""A decoding step for small models of the Llama family on one CPU thread, in NumPy on the module's own memory.

One step of a small model is a few hundred tiny operations. A call of transformers' module, or of a torch operator,
then costs more than what it computes; NumPy's calls are several times cheaper, and its BLAS is as fast. Weights are
read where they lie, so the learner's updates in place are seen. `forward.probe` compares the result with the model's
own logits before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llm_gym.policies.kv_cache import SlotCache

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Pre-norm RMSNorm, rotary embedding over whole heads, gated MLP with SiLU."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone, not on the longest one seen."""
WIDEST = 1024
"""Hidden size above which products take nearly all of the time, and torch's threads are worth more."""
Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (https://arxiv.org/abs/1910.07467) over the last dimension."""

    weight: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight."""
        scale = np.einsum("...i,...i->...", x, x)
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


class Lean:
    """The decoding step of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self._cosine = self._sine = np.empty((0, 1, 1))
        self.refresh()

    @classmethod
    def of(cls, model: Any) -> Lean | None:
        """The step of `model`, or None where it is of no use or not known to be right."""
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
        """Reads where the weights lie; after a tensor was replaced, not changed in place."""
        self.layers = [_layer(layer) for layer in self.decoder.layers]
        self.norm = _norm(self.decoder.norm)
        self.embedding = _array(self.decoder.embed_tokens.weight)
        self.head = _linear(self.model.get_output_embeddings())

    def __call__(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], cache: SlotCache) -> Array:
        """Feeds one new token to each of the first n rows.

        Args:
            ids: int64 [n].
            positions: int64 [n], where they stand in their rows.
            cache: takes the new keys and values.

        Returns:
            The logits after them, [n, vocabulary].
        """
        count, span = len(ids), int(positions.max()) + 1
        cosine, sine = self._angles(positions, cache.length)
        x: Array = self.embedding[ids]
        unseen = np.where(np.arange(span) > positions[:, None], -np.inf, 0.0).astype(x.dtype)[:, None, None]
        rows = np.arange(count)
        with np.errstate(over="ignore"):
            for layer, keys, values in zip(self.layers, cache.keys.numpy(), cache.values.numpy(), strict=True):
                h = layer.before(x)
                heads = (count, -1, keys.shape[-1])
                query, key = layer.query(h).reshape(heads), layer.key(h).reshape(heads)
                if layer.query_norm is not None and layer.key_norm is not None:
                    query, key = layer.query_norm(query), layer.key_norm(key)
                keys[rows, :, positions] = _rotate(key, cosine, sine)
                values[rows, :, positions] = layer.value(h).reshape(heads)
                query = _rotate(query, cosine, sine)
                x += layer.out(_attend(query, keys[:count, :, :span], values[:count, :, :span], unseen))
                h = layer.after(x)
                gate = layer.gate(h)
                gate /= np.exp(-gate) + 1.0
                gate *= layer.up(h)
                x += layer.down(gate)
        return self.head(self.norm(x))

    def _angles(self, positions: npt.NDArray[np.int64], length: int) -> tuple[Array, Array]:
        """Cosines and sines [n, 1, dim] of the positions; the sines of the first half are negated (see `_rotate`)."""
        if len(self._cosine) < length:
            like = self.decoder.embed_tokens.weight
            cosine, sine = self.decoder.rotary_emb(like, torch.arange(length)[None])
            sine[..., : sine.shape[-1] // 2].neg_()
            self._cosine, self._sine = cosine[0, :, None].numpy(), sine[0, :, None].numpy()
        return self._cosine[positions], self._sine[positions]


def watched(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into or comes out of `module`."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of x [n, heads, dim], halves paired as in transformers."""
    half = x.shape[-1] // 2
    y: Array = x * cosine
    y[..., :half] += x[..., half:] * sine[..., :half]
    y[..., half:] += x[..., :half] * sine[..., half:]
    return y


def _attend(query: Array, keys: Array, values: Array, unseen: Array) -> Array:
    """Grouped-query attention of one new token of each row: query [n, heads, dim], keys [n, kept, L, dim]."""
    count, kept, _, dim = keys.shape
    query *= dim**-0.5
    scores: Array = query.reshape(count, kept, -1, dim) @ keys.swapaxes(2, 3)
    scores += unseen
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    mixed: Array = scores @ values
    return mixed.reshape(count, -1)


def _linears_are_plain(model: Any) -> bool:
    """Whether no layer that multiplies by a matrix does anything else, such as an adapter."""
    found = [m for name, m in model.get_decoder().named_modules() if name.endswith("_proj")]
    return all(type(linear) is nn.Linear for linear in [*found, model.get_output_embeddings()])


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


def _linear(module: Any) -> Linear:
    return Linear(_array(module.weight).T, None if module.bias is None else _array(module.bias))


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
