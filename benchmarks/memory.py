"""What each way to save memory saves, and costs: one training step of a model of 30M parameters.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--tokens 2048] [--repeats 1] [--only lora,nf4]

Every row is a forked process of its own: it loads the model, takes a small step (which allocates the optimizer's
state), and then steps on one micro-batch. `held` is what stays between steps (weights and optimizer state), `peak`
the most during a step, both above what the process took before the model was loaded (resident set; VmHWM, reset
before the step). Seconds are CPU seconds of a step, the least of the repeats. Ratios are to the first row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (imports are no part of what is measured)
import peft  # noqa: F401
import torch

import llm_gym.harness.loops.trainer  # noqa: F401
from llm_gym.harness.learner import memory_probe

M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "adamw8bit": {"optimizer": {"name": "adamw8bit"}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
    "muon": {"optimizer": {"name": "muon"}},
    "checkpointing=2": {"memory": {"checkpointing": 2}},
    "checkpointing=1": {"memory": {"checkpointing": 1}},
    "bfloat16": {"optimizer": {"dtype": "bfloat16"}},
    "bfloat16, checkpointing=1": {"optimizer": {"dtype": "bfloat16"}, "memory": {"checkpointing": 1}},
    "train_layers=-2": {"memory": {"train_layers": "-2"}},
    "lora": {"lora": {}},
    "lora, layers=-2": {"lora": {"layers": "-2"}},
    "dora": {"lora": {"kind": "dora"}},
    "lora, base=bfloat16": {"lora": {"base": "bfloat16"}},
    "lora, base=nf4": {"lora": {"base": "nf4"}},
    "lora, base=nf4, checkpointing=1": {"lora": {"base": "nf4"}, "memory": {"checkpointing": 1}},
    "adamw8bit, bfloat16, checkpointing=1": {
        "optimizer": {"name": "adamw8bit", "dtype": "bfloat16"},
        "memory": {"checkpointing": 1},
    },
}


def child(folder: str, fields: dict[str, dict[str, Any]], tokens: int, repeats: int) -> dict[str, float]:
    """Bytes held and at the peak, and CPU seconds, of one row."""
    from llm_gym.harness.learner.learner import Learner
    from llm_gym.harness.learner.optimizers import OptimizerConfig
    from llm_gym.harness.learner.token_budget import probe
    from llm_gym.harness.model.loading import LoraConfig, load_model
    from llm_gym.harness.model.memory import MemoryConfig

    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is gone at once, and not cached by malloc
    start = _resident()
    lora = LoraConfig(**fields["lora"]) if "lora" in fields else None
    model = load_model(folder, lora=lora, memory=MemoryConfig(**fields.get("memory", {})))
    learner = Learner(model, OptimizerConfig(**fields.get("optimizer", {})), total_steps=repeats + 1)
    learner.step(probe(learner, 128))
    batch, seconds, peaks = probe(learner, tokens), [], []
    for _ in range(repeats):
        gc.collect()
        memory_probe._trim()
        held = _resident() - start
        began = time.process_time()
        peaks.append(memory_probe.peak(torch.device("cpu"), lambda: learner.step(batch)))
        seconds.append(time.process_time() - began)
    return {"held": held, "peak": held + max(peaks), "seconds": min(seconds)}


def _resident() -> int:
    gc.collect()
    memory_probe._trim()
    return memory_probe._field(Path("/proc/self/status"), "VmRSS") * 1024


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    chosen = [name for name in ROWS if not args.only or any(part in name for part in args.only.split(","))]
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, fork.Pool(1, maxtasksperchild=1) as pool:
        pool.apply(_write, (folder,))
        print("| what | held MB | peak MB | peak, ratio | CPU s | time, ratio |\n|---|---|---|---|---|---|", flush=True)
        first: dict[str, float] = {}
        for name in chosen:
            found = pool.apply(child, (folder, ROWS[name], args.tokens, args.repeats))
            first = first or found
            held, peak, seconds = found["held"] / 1e6, found["peak"] / 1e6, found["seconds"]
            less, slower = peak / first["peak"] * 1e6, seconds / first["seconds"]
            print(f"| {name} | {held:.0f} | {peak:.0f} | {less:.2f} | {seconds:.2f} | {slower:.2f} |", flush=True)


def _write(folder: str) -> None:
    """Writes the model."""
    from llm_gym.harness.model.loading import new_model

    new_model(MODEL, seed=0).save_pretrained(folder)


if __name__ == "__main__":
    main()
