"""What a variant is: a small random model of one kind, and the parts that several configs share.

One table for `benchmarks/models.py`, which measures all of them, and for the tests, which take a dozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "rotary_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 128,
    "resid_pdrop": 0.0,
}
"""Given to a config as far as it has fields of these names."""


@dataclass(frozen=True)
class Variant:
    """A small model of one kind."""

    name: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the config, beside or instead of `SMALL`; nested mappings are merged into the config's own."""
    switches: tuple[int, ...] = ()
    """Lengths at which the model's behaviour changes: windows, and where a rotary embedding is stretched."""
    loud: Mapping[str, float] = field(default_factory=dict)
    """Part of a parameter's name -> factor on a matrix, or on the first channel of a norm: activations large enough
    for a clamp or a cap to act."""
    longest: int = 64
    """Tokens of the longest row; above every switch."""

    def config(self) -> Any:
        """The transformers config."""
        kind = type(AutoConfig.for_model(self.model_type))
        known = {f.name for f in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
        fields = {name: value for name, value in SMALL.items() if name in known} | dict(self.fields)
        return kind(**{name: value for name, value in fields.items() if value is not ...})

    def model(self, *, seed: int = 0) -> Any:
        """A random model in float32, evaluation mode; no bias is 0, no norm's weight 1, and every layer matters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = self.config()
            kind = (
                AutoModelForCausalLM
                if type(config) in AutoModelForCausalLM._model_mapping
                else AutoModelForImageTextToText
            )
            model = kind.from_config(config, dtype=torch.float32).eval()
            buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("correction_bias")]
            with torch.no_grad():
                for name, parameter in [*model.named_parameters(), *buffers]:
                    if not parameter.is_floating_point():
                        continue
                    spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                    if parameter.dim() < 2 or spread == 0:
                        parameter.add_(0.2 * torch.randn_like(parameter))
                    elif spread < 0.05:
                        parameter.mul_(0.1 / spread)
                    for part, factor in self.loud.items():
                        if part in name:
                            (parameter if parameter.dim() > 1 else parameter[:1]).mul_(factor)
        return model


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


LONG = rope(
    "longrope",
    short_factor=[1.0 + n / 16 for n in range(16)],
    long_factor=[1.0 + n for n in range(16)],
    original_max_position_embeddings=32,
    factor=16.0,
) | {"original_max_position_embeddings": 32}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
LATENT3 = LATENT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": ...}
FULL_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 8, "mamba_chunk_size": 16}
DECODER = {"is_decoder": True}
LARGE_CHANNEL = {"post_attention_layernorm": 100.0}
"""As trained models have it: a channel a hundred times the others goes into the MLPs; a clamp of 10 acts."""

TEXT = {
    name: SMALL[name]
    for name in SMALL
    if not name.startswith(("decoder", "ffn", "word", "init_std", "rotary", "resid"))
}
NO_EYES = dict.fromkeys(
    ("hidden_size", "intermediate_size", "out_hidden_size", "projection_intermediate_size"), 32
) | dict.fromkeys(("depth", "num_hidden_layers", "num_heads", "num_attention_heads"), 1)
