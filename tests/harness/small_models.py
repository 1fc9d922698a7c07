"""Small models and rows for the harness's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llm_gym.harness.model.loading import prepare
from llm_gym.harness.types import TrainSequence

VOCABULARY = 61


def qwen3(seed: int = 0, *, dtype: torch.dtype = torch.float32, fused: bool = True, **fields: Any) -> Any:
    """A Qwen3 of two layers; weights large enough that tokens matter to each other."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            **fields,
        }
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    return prepare(model) if fused else model.eval()


def llama(seed: int = 0, **fields: Any) -> Any:
    """A Llama of two layers, head not tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
        **fields,
    )
    return prepare(LlamaForCausalLM(config))


def row(length: int, seed: int, *, prompt: int | None = None, logprob: float = -3.0) -> TrainSequence:
    """Random tokens; everything after the prompt (by default half) is trained."""
    rng = np.random.default_rng(seed)
    trained = np.arange(length // 2 if prompt is None else prompt, length)
    tokens = rng.integers(0, VOCABULARY, length).astype(np.int32)
    said = (logprob + 0.1 * rng.standard_normal(length)).astype(np.float32)
    return TrainSequence(tokens, trained, {"old_logprobs": said[trained]})


def sample(of: TrainSequence, advantage: float | np.ndarray, episode: int) -> TrainSequence:
    """The row with that credit: one value, or one for each of its tokens [n]."""
    credit = np.broadcast_to(np.asarray(advantage, np.float64), of.tokens.shape)[of.trained]
    return replace(of, streams={**of.streams, "advantages": credit}, episode=episode)


def saying(of: TrainSequence, logprobs: np.ndarray) -> TrainSequence:
    """The row as if its trained tokens [m] had been sampled with these log-probabilities."""
    return replace(of, streams={**of.streams, "old_logprobs": logprobs})


def stretches(row: TrainSequence) -> list[tuple[int, int]]:
    """Where the row's trained tokens begin and end, those without a gap together."""
    parts = np.split(row.trained, np.flatnonzero(np.diff(row.trained) > 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def credit_of(of: TrainSequence) -> float:
    """The one advantage of all its tokens."""
    (value,) = set(of.streams["advantages"].tolist())
    return float(value)


def samples(lengths: list[int], *, seed: int = 0) -> list[TrainSequence]:
    """One row per episode, with random advantages."""
    advantages = np.random.default_rng(seed).standard_normal(len(lengths))
    return [
        sample(row(n, seed + 100 + i), float(a), i) for i, (n, a) in enumerate(zip(lengths, advantages, strict=True))
    ]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every gradient by name; absent ones are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
