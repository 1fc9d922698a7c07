"""Random models small enough to run by the hundred, with logits spread wide enough to tell right from wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from llm_gym.core import Completion, Ids

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny(
    family: str = "Qwen3",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str | None = None,
    **changes: Any,
) -> Any:
    """A random `<family>ForCausalLM`."""
    torch.manual_seed(seed)
    sizes = {name: size for name, size in SIZES.items() if not (name.startswith("num_") and family == "GPTNeo")}
    config = getattr(transformers, f"{family}Config")(**{"tie_word_embeddings": True, **sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model.to(dtype).eval()


def contexts(count: int, seed: int = 0, longest: int = 40) -> list[Ids]:
    """Random contexts of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


@torch.no_grad()
def teacher_forced(model: Any, context: Ids, tokens: Ids, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of `tokens` after `context`, from one plain forward over the whole sequence."""
    ids = torch.from_numpy(np.concatenate([context, tokens])).long()[None]
    logits = model(input_ids=ids).logits[0, len(context) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(context) :, None])[:, 0].numpy()


def worst_gap(model: Any, pairs: list[tuple[Ids, Completion]], temperature: float = 1.0) -> float:
    """The largest difference between reported and teacher-forced log-probabilities."""
    return max(
        float(np.abs(teacher_forced(model, context, c.tokens, temperature) - c.logprobs).max()) for context, c in pairs
    )
