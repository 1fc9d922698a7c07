"""Does a run learn as well whose rollouts are ahead? Training reward at several bounds, beside that of one that waits.

    OMP_NUM_THREADS=1 python benchmarks/async_curves.py [--bounds 0 1 2] [--seeds 0 1 2 3 4] [--steps 60]

Every run has the defaults of `llmgym train` otherwise. Writes async.svg into --out, and prints the mean reward of the
last ten steps by bound; the exit code is 1 if one is more than `MOST` below that of bound 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from algorithms import svg, train

from llm_gym.harness.runs.run_folder import write_atomically

MOST, LAST = 0.03, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/async"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    words = parser.parse_args()
    found = {}
    for bound in words.bounds:
        sets = [f"stream.max_staleness={bound}", "eval.episodes=0"]
        folders = [words.runs / f"{bound}-{seed}" for seed in words.seeds]
        runs = [train("grpo", s, words.steps, f, sets) for s, f in zip(words.seeds, folders, strict=True)]
        found["waits" if bound == 0 else f"bound {bound}"] = runs
    write_atomically(words.out / "async.svg", svg(found, "Training reward with rollouts ahead of the learner"))
    ends = {
        name: [float(np.mean([row["reward/mean"] for row in rows[-LAST:]])) for rows in runs]
        for name, runs in found.items()
    }
    for name, values in ends.items():
        print(f"{name}: {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    base = float(np.mean(ends["waits"])) if "waits" in ends else -1.0
    sys.exit(any(float(np.mean(values)) < base - MOST for values in ends.values()))


if __name__ == "__main__":
    main()
