"""Learning curves of several algorithms on the embedded task, over several seeds, side by side.

    OMP_NUM_THREADS=1 python benchmarks/algorithms.py [--presets grpo rloo ...] [--seeds 0 1 2] [--steps 120]

Every preset trains with the same settings otherwise (the defaults of `llmgym train`), each seed in a run folder of
its own below --runs. Finished runs are not repeated, and one that was stopped goes on from its newest checkpoint.
Writes algorithms.svg (mean and range of the training reward over the seeds) and algorithms.md (greedy and sampled
reward on 512 problems never trained on, before and after) into --out. The exit code is 1 if the sampled reward of any
run did not rise beyond its 95% confidence intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops.progress import TrainProgress
from llm_gym.harness.runs.run_folder import RunFolder, write_atomically
from llm_gym.report.scale import labels, smooth, ticks

PRESETS = ("grpo", "dr_grpo", "rloo", "gspo", "cispo")
Rows = list[dict[str, Any]]
"""The rows of metrics of one run."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 176, 220, 40, 34, 30, 16
"""Of a panel's plot, and the space around it, in pixels."""
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a; } .title { font-weight: 600; font-size: 13px; fill: #1f2328; }
.grid { stroke: #d0d7de; stroke-width: .6; } .other { fill: none; stroke: #afb8c1; stroke-width: 1; opacity: .7; }
.band { fill: #0b6e72; opacity: .22; } .mean { fill: none; stroke: #0b6e72; stroke-width: 2; stroke-linejoin: round; }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1; } .title { fill: #f0f6fc; } .grid { stroke: #3d444d; } .other { stroke: #656c76; }
  .band { fill: #4fc3c7; } .mean { stroke: #4fc3c7; }
}
"""


def train(preset: str, seed: int, steps: int, folder: Path, sets: Sequence[str]) -> Rows:
    """The rows of a finished run; trains it, or the rest of it, if need be."""
    run = RunFolder(folder)
    rows = run.metrics()
    if rows and rows[-1]["step"] >= steps and run.checkpoints():
        return rows
    progress = TrainProgress()
    try:
        config = load(TrainConfig, preset=preset, seed=seed, steps=steps, sets=sets)
        return Trainer(config, out=folder, resume=True, observer=progress).train()
    finally:
        progress.stop()


def curves(runs: Sequence[Rows]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Training reward by seed and step, smoothed, [S, T]."""
    return np.array([smooth([row["reward/mean"] for row in rows if row["step"] > 0], 2.0) for rows in runs])


def svg(found: Mapping[str, Sequence[Rows]], what: str) -> str:
    """Panels side by side on one scale: the mean over seeds, their range, and the other presets' means in grey."""
    every = {preset: curves(runs) for preset, runs in found.items()}
    low, high = min(c.min() for c in every.values()), max(c.max() for c in every.values())
    marks = ticks(float(low), float(high))
    means = [path(curve.mean(0), marks) for curve in every.values()]
    width = LEFT + len(every) * (WIDTH + GAP)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + BOTTOM}" role="img">']
    parts += [f"<title>{what}</title>", f"<style>{STYLE}</style>"]
    for mark, text in zip(marks, labels(marks), strict=True):
        y = TOP + py(mark, marks)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for i, (preset, curve) in enumerate(every.items()):
        parts.append(f'<g transform="translate({LEFT + i * (WIDTH + GAP)} {TOP})">')
        parts += panel(preset, curve, marks, [mean for j, mean in enumerate(means) if j != i])
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(preset: str, curve: Any, marks: Sequence[float], others: Sequence[str]) -> list[str]:
    """One preset's panel."""
    steps = curve.shape[1]
    lines = [f'<line class="grid" x1="0" x2="{WIDTH}" y1="{py(m, marks)}" y2="{py(m, marks)}"/>' for m in marks]
    band = path(curve.max(0), marks) + "L" + path(curve.min(0), marks, backwards=True)[1:] + "Z"
    mean = curve.mean(0)
    return [
        *lines,
        f'<text class="title" x="0" y="-14">{preset}</text>',
        f'<text x="{WIDTH}" y="-14" text-anchor="end">{mean[0]:.2f} → {mean[-1]:.2f}</text>',
        *(f'<path class="other" d="{other}"/>' for other in others),
        f'<path class="band" d="{band}"/>',
        f'<path class="mean" d="{path(mean, marks)}"/>',
        f'<text x="0" y="{HEIGHT + 18}">step 1</text>',
        f'<text x="{WIDTH}" y="{HEIGHT + 18}" text-anchor="end">{steps}</text>',
    ]


def path(values: Any, marks: Sequence[float], *, backwards: bool = False) -> str:
    """An SVG path through a panel."""
    points = [(WIDTH * i / max(1, len(values) - 1), py(value, marks)) for i, value in enumerate(values)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (reversed(points) if backwards else points))


def py(value: float, marks: Sequence[float]) -> float:
    """Where a value lies in a panel, from the top."""
    return round(HEIGHT * (marks[-1] - value) / (marks[-1] - marks[0]), 1)


def table(found: Mapping[str, Sequence[Rows]]) -> list[str]:
    """Evaluation before and after, by preset: mean over seeds, and their range."""
    lines = [
        "| preset | greedy before | greedy after | sampled before | sampled after | learned |",
        "|---|---|---|---|---|---|",
    ]
    for preset, runs in found.items():
        cells = []
        for name in ("eval/greedy_reward", "eval/sampled_reward"):
            ends = np.array([[row[name] for row in rows if row.get(name) is not None] for rows in runs])[:, [0, -1]]
            cells += [
                f"{ends[:, 0].mean():.3f}",
                f"{ends[:, 1].mean():.3f} ({ends[:, 1].min():.3f} to {ends[:, 1].max():.3f})",
            ]
        count = sum(map(learned, runs))
        lines.append(f"| `{preset}` | {' | '.join(cells)} | {count} of {len(runs)} seeds |")
    return lines


def learned(rows: Rows) -> bool:
    """Whether the last interval of the sampled reward lies above the first."""
    measured = [row for row in rows if row.get("eval/sampled_reward") is not None]
    return bool(measured[-1]["eval/sampled_reward_low"] > measured[0]["eval/sampled_reward_high"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=C", help="for every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    found = {
        preset: [train(preset, seed, args.steps, args.runs / f"{preset}-{seed}", args.sets) for seed in args.seeds]
        for preset in args.presets
    }
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = ", ".join(map(str, args.seeds))
    what = f"Training reward on two-digit addition, {args.steps} steps, mean and range of seeds {seeds}"
    write_atomically(args.out / "algorithms.svg", svg(found, what))
    text = [
        f"![{what}](algorithms.svg)",
        f"{what}; in grey the other algorithms' means. Made by `benchmarks/algorithms.py`.",
    ]
    write_atomically(args.out / "algorithms.md", "\n\n".join([*text, "\n".join(table(found))]) + "\n")
    print("\n".join(table(found)))
    sys.exit(0 if all(learned(rows) for runs in found.values() for rows in runs) else 1)


if __name__ == "__main__":
    main()
