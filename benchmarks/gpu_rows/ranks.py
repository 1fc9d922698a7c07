"""Several processes: collectives, FSDP2, a served engine. As a program it is one of two ranks: OUT DEVICE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sync as sync_benchmark
import torch
import torch.distributed as dist

from gpu_rows.models import fields, folder_of, free, make, seconds
from gpu_rows.rows import Found, Setting
from llm_gym.harness.batching.shards import deal, pack_shard
from llm_gym.harness.distributed.fsdp import shard
from llm_gym.harness.distributed.world import ParallelConfig, World, connect
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig, make_optimizers
from llm_gym.harness.types import TrainSequence

STRATEGIES = ("ddp", "fsdp")
Steps = list[dict[str, float]]


def rows(vocabulary: int) -> list[TrainSequence]:
    """Uneven rows of random tokens with credit of either sign; the same everywhere."""
    rng, made = np.random.default_rng(0), []
    for number, length in enumerate([200, 33, 90, 150, 64, 17, 120]):
        known = {"old_logprobs": np.full(length, -6.0), "advantages": rng.normal(size=length)}
        ids = rng.integers(0, vocabulary, length + 1).astype(np.int32)
        made.append(TrainSequence(ids, np.arange(1, length + 1), known, number))
    return made


def two_steps(setting: Setting, world: World, split: Callable[[Learner], None] = lambda learner: None) -> Steps:
    """Metrics of two optimizer steps in float32, the second of which sees what the first has changed."""
    mine = Learner(make("0.6B", setting), OptimizerConfig(lr=1e-3), total_steps=4, world=world)
    split(mine)
    vocabulary = fields("0.6B", setting)["vocab_size"]
    batch = pack_shard(world, deal(world, rows(vocabulary)), max_tokens=256, share=True)
    return [mine.step(batch), mine.step(batch)]


def compare(found: Found, name: str, got: Steps, want: Steps) -> None:
    """Norms of both gradients, relative to those of one process."""
    for number, (a, b) in enumerate(zip(got, want, strict=True), 1):
        gap = abs(a["policy/grad_norm"] / b["policy/grad_norm"] - 1)
        found.add(f"{name}: gap of gradient norm, step {number}", gap, most=1e-4)


def one_process(setting: Setting, found: Found) -> None:
    """The device's backend with one rank: a sum, and FSDP2 around a model against the plain model."""
    where = torch.device(setting.device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    store = dist.HashStore()
    backend = "gloo" if setting.small else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    numbers = torch.ones(1 << (16 if setting.small else 28), device=where)
    found.add("sum of all, ms", 1000 * seconds(setting.device, lambda: dist.all_reduce(numbers)))
    found.holds("the sum is right", bool((numbers == 1).all()))
    want = two_steps(setting, World())

    def split(mine: Learner) -> None:
        shard(mine.backbone.causal, where, 1)
        mine.optimizers = make_optimizers(mine.model, mine.settings)

    compare(found, "FSDP2 of one rank", two_steps(setting, World(), split), want)
    dist.destroy_process_group()


def two_processes(setting: Setting, found: Found) -> None:
    """Two ranks, whole models and split ones, against one process."""
    want = two_steps(setting, World())
    free()
    out = setting.folder / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module"]
    own = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([*command, "gpu_rows.ranks", str(out), setting.device], check=True, env=own)
    for strategy, steps in json.loads(out.read_text("utf-8")).items():
        compare(found, strategy, steps, want)


def server(setting: Setting, found: Found) -> None:
    """A vLLM server of its own process: weights by a file in shared memory, proven, and sampling."""
    from llm_gym.policies.vllm_server.process import ServerProcess

    dtype, model = ("float32", None) if setting.small else ("bfloat16", str(_saved(setting)))
    settings = {"dtype": dtype, "max_model_len": 256, "enforce_eager": True}
    if not setting.small:
        settings["gpu_memory_utilization"] = 0.2
    with ServerProcess(model, settings=settings, echo=print) as process:
        found.add("start, s", seconds("cpu", process.wait))
        for mode in ("file", "disk"):
            urls = [process.url]
            times = sync_benchmark.measure(model, "server", mode, 0, 1, urls, device=setting.device, dtype=dtype)
            for name, taken in times.items():
                found.add(f"{mode}: {name} s", taken)


def _saved(setting: Setting) -> Path:
    return folder_of(make("0.6B", setting), setting, torch.bfloat16)


def main(out: str, device: str) -> None:
    """What a rank does."""
    found = {}
    for strategy in STRATEGIES:
        world = connect(ParallelConfig(strategy, timeout=60), device)
        found[strategy] = two_steps(Setting(device, Path(out).parent), world)
        if world.rank == 0:
            Path(out).write_text(json.dumps(found), "utf-8")
        world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
