"""As a program, trains with an engine in each process: `python engines.py <folder> <server> <run> ...`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llm_gym.errors import SettingError
from llm_gym.harness import TrainConfig, Trainer, load

FEW = ["prompts_per_step=3", "group_size=8", "eval.episodes=0", "steps=3", "parallel.timeout=300"]
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
SOAK = ("vllm, ddp", "server, fsdp")
"""What CI has in other pairs."""
AHEAD = {
    "server, ahead": ["stream.max_staleness=1"],
    "built in, ahead": ["stream.max_staleness=1", "policy.engine=transformers"],
}
"""As `RUNS`, with rollouts ahead of the learners."""


def train(name: str, out: Path, server: str) -> None:
    servers = [f"policy.servers=[{server}]", "policy.server.start_seconds=600"] if "server" in name else []
    run = Trainer(load(TrainConfig, sets=[*FEW, *(RUNS | AHEAD)[name], *servers]), out=out / name)
    run.train()
    said = {"version": run.policy.version}
    if "vllm" in name:
        said["cache"] = run.policy.thread.engine.vllm_config.cache_config.kv_cache_memory_bytes
    (out / name / f"rank-{run.world.rank}").write_text(json.dumps(said))


def fail(out: Path) -> None:
    """Rank 1 has no room for its cache, while rank 0 is inside vLLM's start."""
    if os.environ["RANK"] == "1":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "100000"
    try:
        Trainer(load(TrainConfig, sets=[*FEW, *VLLM]), out=out / "failed")
    except SettingError as error:
        (out / f"failed-{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    folder, address = Path(sys.argv[1]), sys.argv[2]
    for each in sys.argv[3:]:
        train(each, folder, address)
    fail(folder)
