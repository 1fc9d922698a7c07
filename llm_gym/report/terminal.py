"""A curve drawn with braille characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_gym.harness.runs.words import short
from llm_gym.report.scale import smooth, ticks

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille cell (2 dots wide, 4 high), by row and column."""


def terminal_curve(values: Sequence[float], title: str, *, width: int = 64, height: int = 9) -> str:
    """Values against their number, as text of `height` + 2 lines: points, and the smoothed line through them.

    Values that are not finite are left out; with none left, the title says so.
    """
    points = [(i, float(v)) for i, v in enumerate(values) if math.isfinite(v)]
    if not points:
        return f"{title}: nothing to draw"
    line = smooth([v for _, v in points])
    marks = ticks(min(v for _, v in points), max(v for _, v in points))
    low, high = marks[0], marks[-1]
    columns, rows = 2 * width, 4 * height
    cells = [[0] * width for _ in range(height)]

    def dot(x: float, y: float) -> None:
        column = round(x / max(len(values) - 1, 1) * (columns - 1))
        row = round((high - y) / (high - low) * (rows - 1))
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    for (x, raw), level in zip(points, line, strict=True):
        dot(x, raw)
        dot(x, level)
    for (x0, _), y0, (x1, _), y1 in zip(points, line, points[1:], line[1:], strict=False):
        fine = columns + rows
        for k in range(fine):
            dot(x0 + (x1 - x0) * k / fine, y0 + (y1 - y0) * k / fine)

    names = {0: short(high), height // 2: short((low + high) / 2), height - 1: short(low)}
    pad = max(map(len, names.values()))
    body = [f"{names.get(i, ''):>{pad}} ┤{''.join(chr(0x2800 + c) for c in row)}" for i, row in enumerate(cells)]
    last = f"{len(values)}"
    return "\n".join([title, *body, f"{'':>{pad}} └1{last:─>{width - 1}}"])
