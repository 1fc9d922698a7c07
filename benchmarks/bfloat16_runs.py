"""Whether runs in bfloat16 go to their end: the demo, over several seeds, with the built-in engine and with vLLM.

    OMP_NUM_THREADS=1 python benchmarks/bfloat16_runs.py [--seeds 0 1 2 3 4 5 6 7] [--engines transformers vllm]

The learner trains in bfloat16. The built-in engine runs its module (mode `shared`); vLLM holds a copy in bfloat16
(mode `tensors`). Prints one line for each run: steps done, greedy reward before and after, the largest gap between
engine and learner on a canary, and what the proof judged as a share of its limit, at most. Each run has a folder of its
own below --runs; finished runs are not repeated, others go on from their newest checkpoint. The exit code is 1 if a
run was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llm_gym.errors import SyncError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.runs.run_folder import RunFolder

SETS = {"transformers": [], "vllm": ["policy.vllm.max_model_len=256"]}
HEAD = "| seed | mode | steps | greedy before | after | largest gap | share of limit | |\n" + "|---" * 8 + "|"


def run(seed: int, engine: str, steps: int, folder: Path) -> str:
    """Trains, and returns why it stopped; nothing if it did not."""
    rows = RunFolder(folder).metrics()
    if rows and rows[-1]["step"] >= steps:
        return ""
    sets = ["optimizer.dtype=bfloat16", f"policy.engine={engine}", *SETS[engine]]
    try:
        Trainer(load(TrainConfig, seed=seed, steps=steps, sets=sets), out=folder, resume=True).train()
    except SyncError as error:
        return str(error)
    return ""


def line(seed: int, folder: Path, stopped: str) -> str:
    """What came of it."""
    rows = RunFolder(folder).metrics()
    synced = [row for row in rows if "sync/mode" in row]
    greedy: list[Any] = [row["eval/greedy_reward"] for row in rows if "eval/greedy_reward" in row]
    if not synced:
        return f"| {seed} | - | 0 | | | | | {stopped} |"
    gap, share = (max(row[f"sync/canary_{name}"] for row in synced) for name in ("gap_max", "share"))
    after = f"{greedy[-1]:.3f}" if len(greedy) > 1 else "-"
    mode, step = synced[-1]["sync/mode"], rows[-1]["step"]
    return f"| {seed} | {mode} | {step} | {greedy[0]:.3f} | {after} | {gap:.1e} | {share:.2f} | {stopped} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    parser.add_argument("--engines", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--runs", type=Path, default=Path("runs/bfloat16"))
    args = parser.parse_args()
    print(HEAD, flush=True)
    failed = 0
    for seed in args.seeds:
        for engine in args.engines:
            folder = args.runs / f"{engine}-{seed}"
            stopped = run(seed, engine, args.steps, folder)
            failed += bool(stopped)
            print(line(seed, folder, stopped), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
