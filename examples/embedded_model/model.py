"""The model: Qwen3's architecture at 0.86 million parameters, as a folder in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM


def config(vocabulary: int) -> Qwen3Config:
    """Four layers of width 128, four query and two key-value heads, tied embeddings."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )


def new(vocabulary: int, seed: int) -> PreTrainedModel:
    """Random weights (normal, 0.02), float32."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config(vocabulary))


def save(model: PreTrainedModel, out: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors, rounded to bfloat16 (1.7 MB).

    Evaluate what was written, not what was trained: the rounding moves log-probabilities by about 1e-3.
    """
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, eos_token_id=2, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(out)
