"""Every way for weights to reach an engine, side by side in one run: seconds per update, proof and sampling.

    OMP_NUM_THREADS=1 python benchmarks/sync.py [--server] [--updates 5]

Two models: the embedded one (0.9M parameters) and a random one of 30M, both in float32. `update` is from the learner's
weights to an engine that serves them, `proof` the checksums and canaries after it, `sampling` 16 x 16 tokens.
The least of all updates: what the work takes where nothing else runs meanwhile. Only ratios mean anything.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_gym.chat import load_tokenizer
from llm_gym.core import Sampling
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import load_model, new_model
from llm_gym.harness.runs.metrics import clock
from llm_gym.harness.weight_sync.sync import Sync

RANDOM = {
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1408,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
IN_PROCESS = [
    ("transformers", "shared", 0),
    ("vllm", "tensors", 0),
    ("vllm", "adapter", 16),
    ("vllm", "merged", 16),
    ("vllm", "disk", 0),
    ("vllm", "restart", 0),
]
BY_SERVER = [("server", "file", 0), ("server", "adapter", 16), ("server", "merged", 16), ("server", "disk", 0)]
"""Engine, mode, rank of the adapter."""


def measure(
    model: str | None,
    engine: str,
    mode: str,
    rank: int,
    updates: int,
    servers: Sequence[str] = (),
    *,
    device: str = "cpu",
    dtype: str = "float32",
    **vllm: Any,
) -> dict[str, float]:
    """Seconds of an update, of its proof and of sampling.

    Raises:
        SyncError: the weights did not arrive.
    """
    config = load(
        TrainConfig,
        model=model,
        device=device,
        lora={"rank": rank} if rank else None,
        optimizer={"dtype": dtype},
        policy={
            "engine": engine,
            "sync": mode,
            "servers": list(servers),
            "vllm": {"max_model_len": 256, **vllm} if engine == "vllm" else {},
        },
    )
    torch.manual_seed(0)
    learner = Learner(load_model(model, lora=config.lora, device=device), config.optimizer)
    ids = list(np.random.default_rng(0).integers(0, 500, (16, 32)).astype(np.int32))
    times: dict[str, list[float]] = {"update": [], "proof": [], "sampling": []}
    with tempfile.TemporaryDirectory() as folder:
        sync = Sync(config, learner, folder=Path(folder) / "sync", version=0, tell=print)
        for version in range(1, updates + 1):
            move(learner)
            took: dict[str, float] = {}
            with clock(took, "update"):
                row = sync(version)
            with clock(took, "sampling"):
                sync.policy.generate(ids, Sampling(max_tokens=16, stop_token_ids=()), seeds=range(16))
            times["update"].append(took["update"] - row["time/proof"])
            times["proof"].append(row["time/proof"])
            times["sampling"].append(took["sampling"])
        sync.close()
    return {name: min(values) for name, values in times.items()}


def line(model: str | None, engine: str, mode: str, rank: int, updates: int, servers: Sequence[str] = ()) -> str:
    """A row of the table."""
    found = measure(model, engine, mode, rank, updates, servers)
    return f"| {engine} | {mode} | {rank or '-'} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |"


def move(learner: Learner) -> None:
    """What an optimizer step does, as far as engines are concerned."""
    with torch.no_grad():
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))


def random_model(folder: Path) -> str:
    """A folder with the random model and a tokenizer."""
    new_model(RANDOM, seed=0).save_pretrained(folder)
    load_tokenizer(None).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--server", action="store_true", help="also through a server on this machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("embedded, 0.9M", None), ("random, 30M", random_model(Path(folder)))):
            print(f"\n{name}\n\n| engine | mode | rank | update s | proof s | sampling s |\n|---|---|---|---|---|---|")
            for engine, mode, rank in IN_PROCESS:
                print(line(model, engine, mode, rank, options.updates), flush=True)
            if options.server:
                through_server(model, options.updates)


def through_server(model: str | None, updates: int) -> None:
    """The rows of a server, which is started for them."""
    from llm_gym.policies.vllm_server.process import ServerProcess

    settings = {"dtype": "float32", "max_model_len": 256, "enable_lora": True, "max_lora_rank": 16}
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(model, settings=settings))
        server.wait()
        for engine, mode, rank in BY_SERVER:
            print(line(model, engine, mode, rank, updates, [server.url]), flush=True)


if __name__ == "__main__":
    main()
