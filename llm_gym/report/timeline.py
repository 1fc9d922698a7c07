"""When a run's last steps rolled out, trained and waited, as geometry; `page.html` turns it into SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_gym.report.run import Run

WIDTH, LANE, TOP, LEFT, RIGHT = 940, 16, 20, 64, 930
PHASES = ("rollout", "train", "sync", "eval")
"""In the order of their colours."""
STEPS, LANES = 6, 16
"""Steps that are drawn, and groups beside each other."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A phase of the trainer, or a group that was being played."""

    x: float
    y: float
    width: float
    color: int
    """0: a group; else 1 + the place in `PHASES`."""
    text: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The last steps of a run; y grows downwards, the trainer's lane is the first."""

    bars: list[Bar]
    steps: list[tuple[float, str]]
    """Where each step begins, and its number."""
    height: float
    note: str


def last_steps(run: Run) -> Timeline | None:
    """The last steps of a run whose rollouts were ahead of the learner; None for one that waits, or an older one.

    Where the run went on in another process, these are its steps alone: the clock is the process's own.
    """
    last = [row for row in run.timeline[-STEPS:] if row.get("since") == run.timeline[-1].get("since")]
    rows = [row for row in last if row.get("groups")]
    if not rows:
        return None
    began = min(start for row in rows for start, _ in row["phases"].values())
    ended = max(stop for row in rows for _, stop in row["phases"].values())
    scale = (RIGHT - LEFT) / max(ended - began, 1e-9)

    def bar(start: float, stop: float, lane: int, color: int, text: str) -> Bar:
        start, stop = max(start, began), min(stop, ended)
        x, width = LEFT + (start - began) * scale, max((stop - start) * scale, 1.0)
        return Bar(round(x, 1), TOP + lane * LANE, round(width, 1), color, f"{text}: {stop - start:.2f} s")

    bars = []
    for row in rows:
        for place, phase in enumerate(PHASES):
            if phase in row["phases"]:
                start, stop = row["phases"][phase]
                bars.append(bar(start, stop, 0, 1 + place, f"step {row['step']}, {phase}"))
    groups = [group for row in rows for group in row["groups"] if group[2] > began]
    lanes = _lanes(groups)
    bars += [
        bar(start, stop, 1 + lane, 0, f"task {number}")
        for (number, start, stop), lane in zip(groups, lanes, strict=True)
        if lane < LANES
    ]
    steps = [(round(LEFT + (row["phases"]["step"][0] - began) * scale, 1), f"{row['step']}") for row in rows]
    hidden = sum(lane >= LANES for lane in lanes)
    more = f"; {hidden} more groups are not drawn" if hidden else ""
    height = TOP + LANE * (1 + min(max(lanes, default=0) + 1, LANES)) + 4
    return Timeline(
        bars, steps, height, f"the trainer above, the groups that it took below: {ended - began:.1f} s{more}"
    )


def _lanes(groups: Sequence[Sequence[Any]]) -> list[int]:
    """For each group the first lane that is free when it begins."""
    free: list[float] = []
    lanes: dict[int, int] = {}
    for i in sorted(range(len(groups)), key=lambda i: (groups[i][1], groups[i][0])):
        _, start, stop = groups[i]
        lanes[i] = next((lane for lane, until in enumerate(free) if until <= start), len(free))
        free[lanes[i] : lanes[i] + 1] = [stop]
    return [lanes[i] for i in range(len(groups))]
