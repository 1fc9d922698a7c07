"""Axes with round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llm_gym.harness.runs.words import short


def labels(marks: Sequence[float]) -> list[str]:
    """Ticks as text, in as many digits as tell them apart.

    >>> labels([0.998, 0.999, 1.0, 1.001])
    ['0.998', '0.999', '1', '1.001']
    """
    return next(t for d in range(3, 18) if len(set(t := [short(m, d) for m in marks])) == len(marks) or d == 17)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose [low, high], about `count` intervals.

    >>> ticks(0.03, 0.86)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(1, 1)
    [0.5, 1.0, 1.5]
    """
    if low == high == 0:
        return [0.0, 1.0]
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) / 2 or 1.0
        return [float(low - pad), float(low), float(low + pad)]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / raw))) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def smooth(values: Sequence[float], width: float | None = None) -> list[float]:
    """A Gaussian-weighted average around each point; `width` is its standard deviation in points.

    Weights are normalised at the ends, so a constant stays constant.
    """
    data = np.asarray(values, np.float64)
    sigma = len(data) / 25 if width is None else width
    if len(data) < 3 or sigma <= 0:
        return [float(v) for v in values]
    reach = min(len(data) - 1, math.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight = np.convolve(np.ones(len(data)), kernel)[reach : reach + len(data)]
    smoothed = np.convolve(data, kernel)[reach : reach + len(data)] / weight
    return [float(v) for v in smoothed]
