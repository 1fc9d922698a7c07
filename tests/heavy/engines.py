"""As a program, trains with an engine in each process: `python engines.py <folder> <server> <run> ...`."""

from __future__ import annotations

import sys
from pathlib import Path

from llm_gym.harness import TrainConfig, Trainer, load

FEW = ["prompts_per_step=3", "group_size=8", "eval.episodes=0", "steps=3", "optimizer.lr=1e-3", "parallel.timeout=300"]
CACHE = 128 << 20
VLLM = ["policy.engine=vllm", "policy.vllm.max_model_len=256", f"policy.vllm.kv_cache_memory_bytes={CACHE}"]
FSDP = ["parallel.strategy=fsdp"]
RUNS: dict[str, list[str]] = {
    "vllm, ddp": VLLM,
    "vllm, fsdp": [*VLLM, *FSDP],
    "server, ddp": [],
    "server, fsdp": FSDP,
    "server, fsdp, lora": [*FSDP, "lora.rank=4"],
}
"""Name -> settings; three groups are dealt to two processes unevenly."""


def config(name: str, server: str) -> TrainConfig:
    servers = [f"policy.servers=[{server}]"] if "server" in name else []
    return load(TrainConfig, sets=[*FEW, *RUNS[name], *servers])


def train(name: str, out: Path, server: str = "") -> Trainer:
    run = Trainer(config(name, server), out=out / name)
    run.train()
    (out / name / f"version-{run.world.rank}").write_text(str(run.policy.version))
    return run


if __name__ == "__main__":
    folder, address, *names = sys.argv[1:]
    for each in names:
        train(each, Path(folder), address)
