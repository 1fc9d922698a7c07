"""Metrics as chart geometry; `page.html` turns it into SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llm_gym.harness.runs.words import short
from llm_gym.report.plots import MAIN, MORE, MOST_LINES, Plot, ending_plots, evaluation_plots, is_evaluation, one
from llm_gym.report.run import Run, Series
from llm_gym.report.scale import labels, smooth, ticks

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 452, 10, 194
"""The plot's box inside WIDTH x HEIGHT."""
MOST_POINTS = 400
"""A longer curve keeps the least and the greatest of each stretch."""
MOST_HOVERS = 150
"""Columns that show their values under the pointer."""
SMOOTH_FROM = 12
"""Shorter curves are drawn as they are."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A round number and where it lies on its axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: the points as logged and, for long ones, the smoothed line."""

    name: str
    raw: str
    """SVG path through the points."""
    smooth: str
    """SVG path of the smoothed curve; equal to `raw` for short curves."""
    band: str
    """SVG path around the confidence interval; empty for a metric without one."""
    dots: list[tuple[float, float]]
    """The points to mark; none on long curves."""
    first: str
    last: str
    """The ends of the smoothed curve, as text."""


@dataclass(frozen=True, slots=True)
class Hover:
    """A column of the chart that shows its values under the pointer."""

    left: float
    width: float
    x: float
    marks: list[tuple[int, float]]
    """(index of the line, y) of each value."""
    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """The ranges of both axes, mapped onto the plot's box."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, step: float) -> float:
        """Where a step lies from left to right."""
        return round(LEFT + (step - self.x[0]) / (self.x[1] - self.x[0]) * (RIGHT - LEFT), 1)

    def py(self, value: float) -> float:
        """Where a value lies from top to bottom."""
        return round(BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (BOTTOM - TOP), 1)


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart, in SVG units."""

    title: str
    note: str
    lines: list[Line]
    x: list[Tick]
    y: list[Tick]
    hovers: list[Hover]


EACH = "reward/mean/"
"""Metrics that a mixture has for each environment."""


def main_charts(run: Run) -> list[Chart]:
    """The charts that say whether the run learned: rewards, and the parts of the training reward side by side."""
    parts = tuple((name, name.partition("/")[2]) for name in _parts(run)[:MOST_LINES])
    plots = [Plot("Parts of the reward", "mean of the episodes of each step, unweighted", parts)] if parts else []
    return _charts(run, [*MAIN, *plots, *evaluation_plots(run.metrics)])


def _parts(run: Run) -> list[str]:
    """The metrics of the reward's components that vary, if there are several; a single one is the reward itself."""
    shown, same = {name for plot in MAIN + MORE for name, _ in plot.metrics}, constants(run)
    every = [name for name in run.metrics if name.startswith("reward/") and name.count("/") == 1 and name not in shown]
    return [name for name in every if name not in same] if len(every) > 1 else []


def constants(run: Run) -> dict[str, str]:
    """The metrics that were one number (up to rounding) over several steps; they need no chart."""
    return {
        name: short(series.values[-1])
        for name, series in run.metrics.items()
        if len(series.values) > 1
        and max(series.values) - min(series.values) <= 1e-6 * abs(series.values[-1])
        and not name.startswith("eval/")
    }


def more_charts(run: Run) -> list[Chart]:
    """Every other chart: the known metrics, then whatever else was logged and varies."""
    shown = {name for plot in MAIN + MORE for name, _ in plot.metrics} | set(_parts(run)[:MOST_LINES])
    same = constants(run)
    rest = [name for name in run.metrics if name not in shown and name not in same and not is_evaluation(name)]
    each = [name for name in rest if name.startswith(EACH)]
    plots = [Plot("Training reward by environment", "mean", tuple((name, name.removeprefix(EACH)) for name in each))]
    plots += [*MORE, *ending_plots(name for name, series in run.metrics.items() if any(series.values))]
    plots += [one(name, "", name) for name in rest if name not in each]
    return _charts(run, [plot for plot in plots if any(name not in same for name, _ in plot.metrics)])


def _charts(run: Run, plots: Sequence[Plot]) -> list[Chart]:
    drawn = []
    for plot in plots:
        named = {name: run.series(metric) for metric, name in plot.metrics}
        bands = {name: (run.series(f"{metric}_low"), run.series(f"{metric}_high")) for metric, name in plot.metrics}
        drawn.append(chart(plot.title, plot.note, named, bands))
    return [c for c in drawn if c is not None]


def chart(
    title: str, note: str, named: Mapping[str, Series], bands: Mapping[str, tuple[Series, Series]] | None = None
) -> Chart | None:
    """The geometry of a chart of named series; None if none of them has a value.

    Args:
        title: above the chart.
        note: under the title.
        named: the curves.
        bands: (low, high) of their confidence intervals, as far as there are any.
    """
    named = {name: series for name, series in named.items() if series}
    if not named:
        return None
    bands = {name: ends for name, ends in (bands or {}).items() if name in named and all(ends)}
    values = [v for series in named.values() for v in series.values]
    values += [v for ends in bands.values() for series in ends for v in series.values]
    steps = [s for series in named.values() for s in series.steps]
    y = ticks(min(values), max(values))
    y = y if min(values) < 0 else [t for t in y if t >= 0]
    x = (min(steps), max(steps)) if min(steps) < max(steps) else (min(steps) - 1, max(steps) + 1)
    frame = Frame(x, (y[0], y[-1]))
    return Chart(
        title=title,
        note=note,
        lines=[_line(name, series, frame, bands.get(name)) for name, series in named.items()],
        x=[Tick(frame.px(t), f"{t:,.0f}") for t in ticks(*x, 5) if x[0] <= t <= x[1] and t == int(t)],
        y=[Tick(frame.py(t), text) for t, text in zip(y, labels(y), strict=True)],
        hovers=_hovers(named, frame),
    )


def _line(name: str, series: Series, frame: Frame, ends: tuple[Series, Series] | None) -> Line:
    long = len(series.values) >= SMOOTH_FROM
    level = smooth(series.values) if long else series.values
    raw = [(frame.px(s), frame.py(v)) for s, v in zip(series.steps, series.values, strict=True)]
    line = [(frame.px(s), frame.py(v)) for s, v in zip(series.steps, level, strict=True)]
    dots = [] if long else raw
    return Line(name, _path(raw), _path(line), _band(ends, frame), dots, short(level[0]), short(level[-1]))


def _band(ends: tuple[Series, Series] | None, frame: Frame) -> str:
    """A closed path along the lower end and back along the upper one."""
    if ends is None:
        return ""
    low, high = ([(frame.px(s), frame.py(v)) for s, v in zip(e.steps, e.values, strict=True)] for e in ends)
    return f"{_path(low)}L{_path(high[::-1])[1:]}Z"


def _path(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through the points, thinned to its extremes if there are very many."""
    if len(points) > MOST_POINTS:
        size = -(-len(points) // (MOST_POINTS // 2))
        stretches = [points[i : i + size] for i in range(0, len(points), size)]
        ends = [(min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])) for s in stretches]
        points = [point for pair in ends for point in sorted(set(pair))]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _hovers(named: Mapping[str, Series], frame: Frame) -> list[Hover]:
    """A column for each logged step (for every k-th of very many)."""
    tables = {name: dict(zip(series.steps, series.values, strict=True)) for name, series in named.items()}
    steps = sorted({step for table in tables.values() for step in table})
    steps = steps[:: -(-len(steps) // MOST_HOVERS)]
    middles = [(frame.px(a) + frame.px(b)) / 2 for a, b in pairwise(steps)]
    hovers = []
    for step, (left, right) in zip(steps, pairwise([LEFT, *middles, RIGHT]), strict=True):
        here = [(i, name, table[step]) for i, (name, table) in enumerate(tables.items()) if step in table]
        text = ", ".join(f"{name} {short(value)}".strip() for _, name, value in here)
        marks = [(i, frame.py(value)) for i, _, value in here]
        hovers.append(Hover(round(left, 1), round(right - left, 1), frame.px(step), marks, f"step {step:,}: {text}"))
    return hovers
