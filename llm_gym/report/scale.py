"""Numbers as people read them, and axes with round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float, digits: int = 3) -> str:
    """A number in `digits` significant digits: `0.953`, `12.4`, `3.21M`, `4.1e-05`.

    >>> [short(v) for v in (0, 0.9532, 12.36, 999.7, 1024, 3_210_000, 0.000041, float("nan"))]
    ['0', '0.953', '12.4', '1k', '1.02k', '3.21M', '4.1e-05', '–']
    """
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.{digits}g}"
    for size, letter in _SI:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits - 1}g}"


def labels(marks: Sequence[float]) -> list[str]:
    """Ticks as text, in as many digits as tell them apart.

    >>> labels([0.998, 0.999, 1.0, 1.001])
    ['0.998', '0.999', '1', '1.001']
    """
    return next(t for d in range(3, 18) if len(set(t := [short(m, d) for m in marks])) == len(marks) or d == 17)


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    >>> [duration(s) for s in (0.42, 7, 161, 7325, 200_000)]
    ['0.4 s', '7 s', '2 min 41 s', '2 h 2 min', '2 d 7 h']
    """
    if seconds < 1:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count)


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
