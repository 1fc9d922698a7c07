"""A forward over cached rows for models of the Llama family, without the modules' own overhead.

A decoding step of a small model is a hundred small operations, and transformers spends more time between them than
in them. Here the same layers are read (never copied: the learner's updates are seen at once) and run in a plain
loop. `forward.probe` compares the result with the model's own logits before it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_gym.policies.kv_cache import SlotCache, attend

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Pre-norm RMSNorm, rotary embedding over whole heads, gated MLP."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone, not on the longest one seen."""


class Lean:
    """The forward of one model; see `forward.Forward` for the call."""

    def __init__(self, model: Any) -> None:
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.decoder, self.head = causal.get_decoder(), causal.get_output_embeddings()
        self._cosine = self._sine = torch.empty(0)

    @classmethod
    def of(cls, model: Any) -> Lean | None:
        """The forward of `model`, or None where it is not known to be right: another family, half precision, hooks."""
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        rope = getattr(causal.config, "rope_parameters", None) or {}
        exact = {parameter.dtype for parameter in causal.parameters()} in ({torch.float32}, {torch.float64})
        known = type(causal).__name__ in FAMILY and rope.get("rope_type", "default") in STATIC_ROPE
        return cls(model) if known and exact and not any(map(watched, causal.modules())) else None

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Logits after the last column, [n, vocabulary]."""
        rows, new = ids.shape
        x = self.decoder.embed_tokens(ids.flatten())
        cosine, sine = self._angles(positions.flatten(), cache.length, x)
        for number, layer in enumerate(self.decoder.layers):
            attention, mlp = layer.self_attn, layer.mlp
            h = _norm(x, layer.input_layernorm)
            query, key, value = (
                _linear(h, project).view(rows * new, -1, attention.head_dim)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = _norm(query, attention.q_norm), _norm(key, attention.k_norm)
            query, key, value = (
                stream.view(rows, new, -1, attention.head_dim).transpose(1, 2)
                for stream in (_rotate(query, cosine, sine), _rotate(key, cosine, sine), value)
            )
            key, value = cache.update(key, value, number)
            mixed, _ = attend(attention, query, key, value, mask, attention.scaling)
            _add(x, mixed.reshape(rows * new, -1), attention.o_proj)
            h = _norm(x, layer.post_attention_layernorm)
            gate = mlp.act_fn(_linear(h, mlp.gate_proj)).mul_(_linear(h, mlp.up_proj))
            _add(x, gate, mlp.down_proj)
        return _linear(_norm(x.view(rows, new, -1)[:, -1], self.decoder.norm), self.head)

    def _angles(self, positions: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, dim] of the positions; the sines of the first half are negated (see `_rotate`)."""
        if len(self._cosine) < length or self._cosine.dtype != like.dtype or self._cosine.device != like.device:
            every = torch.arange(length, device=like.device)[None]
            cosine, sine = self.decoder.rotary_emb(like, every)
            sine[..., : sine.shape[-1] // 2].neg_()
            self._cosine, self._sine = cosine[0, :, None], sine[0, :, None]
        return self._cosine[positions], self._sine[positions]


def watched(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into or comes out of `module`."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _norm(x: Tensor, module: Any) -> Tensor:
    """RMSNorm over the last dimension (https://arxiv.org/abs/1910.07467)."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    normal: Tensor = x * scale.add_(module.variance_epsilon).rsqrt_()
    return normal.mul_(module.weight)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of x [N, heads, dim], halves paired as in transformers."""
    return (x * cosine).addcmul_(x.roll(x.shape[-1] // 2, -1), sine)


def _linear(x: Tensor, module: Any) -> Tensor:
    """The layer's output; a layer that is no plain one (an adapter is on it) is called."""
    y: Tensor = nn.functional.linear(x, module.weight, module.bias) if type(module) is nn.Linear else module(x)
    return y


def _add(x: Tensor, h: Tensor, module: Any) -> None:
    """x += module(h)."""
    if type(module) is nn.Linear and getattr(module, "bias", None) is None:
        x.addmm_(h, module.weight.t())
    else:
        x.add_(module(h))
