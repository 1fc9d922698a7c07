"""Models of real shapes with random weights, made on the device; batches, folders and a tokenizer for them."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_rows.rows import Setting
from llm_gym.chat import load_tokenizer
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.loading import LoraConfig, export, prepare
from llm_gym.harness.model.memory import MemoryConfig

COMMON: Mapping[str, Any] = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "eos_token_id": 2,  # of the tokenizer below
    "pad_token_id": 0,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "0.6B": {
        **COMMON,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    },
    "4B": {
        **COMMON,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
    },
}
"""Fields of the configurations of Qwen3-0.6B and Qwen3-4B."""
TINY = {"vocab_size": 576, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "intermediate_size": 128}


def fields(shape: str, setting: Setting) -> dict[str, Any]:
    """A row of `SHAPES`; in the small form a tiny model with as many queries to a key."""
    found = dict(SHAPES[shape])
    if setting.small:
        heads = {name: found[name] // 4 for name in ("num_attention_heads", "num_key_value_heads")}
        found |= TINY | heads
    return found


def make(
    shape: str, setting: Setting, *, lora: LoraConfig | None = None, memory: MemoryConfig | None = None, seed: int = 0
) -> Any:
    """A float32 model ready to train; its weights are drawn where they stay, which takes seconds and not minutes."""
    config = AutoConfig.for_model("qwen3", **fields(shape, setting))
    torch.manual_seed(seed)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return prepare(model, device=setting.device, lora=lora, memory=memory)


def learner(shape: str, setting: Setting, *, dtype: str = "bfloat16", name: str = "adamw", **of_model: Any) -> Learner:
    """A learner of such a model; its rate is so small that many steps change little."""
    return Learner(make(shape, setting, **of_model), OptimizerConfig(name, lr=1e-6, dtype=dtype), total_steps=1000)


def free() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def folder_of(model: Any, setting: Setting, dtype: torch.dtype) -> Path:
    """A folder with a copy of the model in that type, and a tokenizer that knows all of its ids."""
    folder = setting.folder / "model"
    export(model, folder, dtype=dtype)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """The embedded model's tokenizer, with ids up to `vocabulary` that no text leads to, but that are text."""
    load_tokenizer(None).save_pretrained(folder)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text("utf-8"))
    known = whole["model"]["vocab"]
    first = 1 + max([*known.values(), *(added["id"] for added in whole["added_tokens"])])
    known |= {f"word{number}": number for number in range(first, vocabulary)}
    file.write_text(json.dumps(whole), "utf-8")


def seconds(device: str, run: Callable[[], object]) -> float:
    """Wall seconds, the GPU's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| relative to |b|; infinite if one is not finite."""
    a, b = a.detach().double(), b.detach().double()
    gap = float((a - b).norm() / b.norm())
    return gap if gap == gap else float("inf")
