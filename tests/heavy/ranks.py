"""Starts processes as torchrun does, and is the program that compares gradients: `python ranks.py <what> <out>`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(command: Sequence[str], size: int, **popen: Any) -> list[subprocess.Popen[str]]:
    """`command` as ranks 0 to size - 1, with torchrun's variables; rank 0 holds the store."""
    paths = [str(HERE.parents[1]), str(HERE.parent / "harness"), os.environ.get("PYTHONPATH", "")]
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(command, env=base | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True, **popen)
        for r in range(size)
    ]


def run(command: Sequence[str], size: int, *, timeout: float = 500) -> None:
    """Runs `command` as `size` ranks to their end; none is left behind."""
    ranks = start(command, size, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [
        f"rank {i}: {text[-3000:]}" for i, (rank, text) in enumerate(zip(ranks, said, strict=True)) if rank.returncode
    ]
    assert not failed, "\n".join(failed)


# The program


def one_step(name: str, dtype: Any, world: Any, share: str, lora: bool = False) -> dict[str, Any]:
    """Two optimizer steps of a preset; gradients of the first, weights after the second, metrics of both."""
    from small_models import qwen3
    from test_presets import prepared

    from llm_gym.harness.learner import Learner
    from llm_gym.harness.model import LoraConfig, prepare
    from llm_gym.harness.optimizers import OptimizerConfig
    from llm_gym.harness.sharding import whole

    config, rows = prepared(name, qwen3(dtype=dtype))
    model = qwen3(dtype=dtype)
    if lora:
        import torch

        torch.manual_seed(1)
        model = prepare(model, lora=LoraConfig(rank=4))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
    how = {"normaliser": config.loss.normaliser, "constant_length": config.loss.constant_length, "share": True}
    settings = OptimizerConfig(lr=1e-2, eps=1e-3, max_grad_norm=1e3, weight_decay=0.1)
    learner = Learner(model, settings, config.loss, total_steps=4, world=world)
    found: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        if "gradients" not in found:
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            found["gradients"] = {n: whole(g).clone() for n, g in grads.items()}

    for optimizer in learner.optimizers:
        optimizer.register_step_pre_hook(keep)
    batch = world.pack(rows, max_tokens=50, **how) if share == "dealt" else by_hand(rows, world, how)
    found["passes"] = world.gather(len(batch.micro), "passes")
    found["metrics"] = [learner.step(batch), learner.step(batch)]
    found["weights"] = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
    return found


def by_hand(rows: Any, world: Any, how: Any) -> Any:
    """Five micro-batches on rank 0, three on rank 1, none on rank 2."""
    from dataclasses import replace

    from llm_gym.harness.batching import pack

    batch = pack(rows, max_tokens=1, **how)
    assert len(batch.micro) == 8
    cuts = {1: [slice(None)], 2: [slice(0, 7), slice(7, None)], 3: [slice(0, 5), slice(5, None), slice(0, 0)]}
    return replace(batch, micro=batch.micro[cuts[world.size][world.rank]])


def main(out: str) -> None:
    import torch

    from llm_gym.harness.parallel import ParallelConfig, connect
    from llm_gym.harness.presets import PRESETS

    torch.set_num_threads(1)
    found = {}
    for strategy in ("ddp", "fsdp"):
        world = connect(ParallelConfig(strategy, timeout=120))
        for share in ("dealt", "by hand"):
            for name in PRESETS:
                found[strategy, share, name, "float64"] = one_step(name, torch.float64, world, share)
            found[strategy, share, "grpo", "float32"] = one_step("grpo", torch.float32, world, share)
            found[strategy, share, "lora", "float64"] = one_step("grpo", torch.float64, world, share, lora=True)
        first = world.rank == 0
        world.close()
        if world.size == 1:
            break
    if first:
        torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1])
