"""Does everything learn at its default rate? Each optimizer, kind of adapters, preset and start, trained and measured.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py [--only muon lora ...] [--seeds 0] [--runs runs/defaults]

Every case trains two-digit addition from the embedded model (or what its start makes of it) with nothing set but what
the case is about; rates are those that `rates` chooses. Greedy reward on 256 problems never trained on is measured
every 20 steps. Prints a table, ready for docs/benchmarks.md; the exit code is 1 if a case does not reach 0.9.
Finished runs are not repeated, and one that was stopped goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llm_gym
from llm_gym.core import Sampling
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.algorithms.presets import PRESETS
from llm_gym.harness.learner.optimizers import OPTIMIZERS
from llm_gym.harness.loops.progress import TrainProgress
from llm_gym.harness.loops.sft import SFTConfig, sft
from llm_gym.harness.model.lora import KINDS
from llm_gym.harness.runs.run_folder import RunFolder, write_atomically
from llm_gym.models.plain import HELD
from llm_gym.policies.builtin.policy import TransformersPolicy

GOAL = 0.9
STEPS, STEPS_OF_NF4 = 120, 240
COMMON = ("eval.every=20", "eval.episodes=256")
Start = Callable[[Path], str | None]
"""Folder for what has to be made first -> what `--model` is given."""


@dataclass(frozen=True)
class Case:
    """One run."""

    sets: tuple[str, ...] = ()
    start: Start = lambda folder: None
    steps: int = STEPS


def sft_output(folder: Path) -> str:
    """The run folder of a short `sft` on what the embedded model itself samples: it knows no more than before.

    (On its greedy replies it would lose its entropy, and with it most of what reinforcement learning has to compare.)
    """
    out = folder / "start-sft"
    if not (out / "model" / "config.json").is_file():
        sampling = Sampling(max_tokens=64)
        played = llm_gym.rollout("Arithmetic-v0", TransformersPolicy(), seeds=range(640), sampling=sampling)
        examples = [{"messages": list(episode.messages)} for episode in played]
        sft(SFTConfig(out=str(out), steps=10), examples, resume=True, progress=False)
    return str(out)


def run_folder(folder: Path) -> str:
    """A run of `train`, cut short, to go on from as a new one."""
    out = folder / "start-run"
    train(load(TrainConfig, sets=[*COMMON, "checkpoint.every=10"], steps=20), out)
    return str(out)


def checkpoint(folder: Path) -> str:
    """A checkpoint of that run."""
    return str(Path(run_folder(folder)) / "checkpoints" / "step_000010")


CASES: Mapping[str, Case] = {
    **{name: Case((f"optimizer.name={name}",)) for name in OPTIMIZERS},
    **{name: Case((f"lora.kind={name}",)) for name in KINDS},
    **{
        f"lora, {base}": Case((f"lora.base={base}",), steps=STEPS_OF_NF4 if base == "nf4" else STEPS)
        for base in HELD
        if base != "float32"
    },
    **{name: Case((f"preset={name}",)) for name in PRESETS},
    "sft output": Case(start=sft_output),
    "run folder": Case(start=run_folder),
    "checkpoint": Case(start=checkpoint),
}
"""Name -> what is trained. `adamw` is the plain default."""


def train(config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished run; trains it, or the rest of it, if need be."""
    run = RunFolder(folder)
    rows = run.metrics()
    if rows and rows[-1]["step"] >= config.steps and run.checkpoints():
        return rows
    progress = TrainProgress()
    try:
        return Trainer(config, out=folder, resume=True, observer=progress).train()
    finally:
        progress.stop()


def line(name: str, seed: int, config: TrainConfig, rows: list[dict[str, Any]]) -> str:
    """A row of the table."""
    greedy = {row["step"]: row["eval/greedy_reward"] for row in rows if row.get("eval/greedy_reward") is not None}
    reached = next((str(step) for step, reward in greedy.items() if reward >= GOAL), "-")
    settled = config.resolved().optimizer
    rate = f"{settled.lr:g}" + (f", {settled.muon_lr:g}" if settled.muon_lr is not None else "")
    sampled = rows[-1]["eval/sampled_reward"]
    return f"| {name} | {seed} | {rate} | {greedy[0]:.3f} | {reached} | {greedy[config.steps]:.3f} | {sampled:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/defaults"))
    args = parser.parse_args()
    table = [
        f"| case | seed | rate | greedy before | first step at {GOAL} | greedy after | sampled after |",
        "|---|---|---|---|---|---|---|",
    ]
    learned = True
    for name in args.only:
        case = CASES[name]
        for seed in args.seeds:
            made = {"model": case.start(args.runs), "steps": case.steps, "seed": seed}
            config = load(TrainConfig, sets=[*COMMON, *case.sets], **made)
            rows = train(config, args.runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
            table.append(line(name, seed, config, rows))
            learned &= rows[-1]["eval/greedy_reward"] >= GOAL
            write_atomically(args.runs / "defaults.md", "\n".join(table) + "\n")
            print(table[-1], flush=True)
    print("\n".join(table))
    sys.exit(0 if learned else 1)


if __name__ == "__main__":
    main()
