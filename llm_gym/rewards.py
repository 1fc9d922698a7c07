"""Rewards as numbers: what may be one, and what components weigh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from llm_gym.errors import ConfigError, unknown

NUMBERS: tuple[Any, ...] = (float, int, Real, np.bool_)
"""What a reward may be; the first two are there for speed."""


def finite(value: object) -> float | None:
    """A number of any kind as a float; None if it is none, or not finite."""
    if not isinstance(value, NUMBERS):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond every float
        return None
    return number if math.isfinite(number) else None


def checked_weights(weights: Mapping[str, Any] | None, names: Sequence[str] | None) -> dict[str, float]:
    """The argument `reward_weights` as floats; `names` are all components that there are, or None.

    Raises:
        ConfigError: an unknown name, or no finite number.
    """
    if not isinstance(weights, Mapping | None):
        raise ConfigError(f"reward_weights: got {weights!r:.80}, want a weight by name, such as {{'format': 0.1}}.")
    for name, weight in (weights or {}).items():
        if names is not None and name not in names:
            raise ConfigError(unknown("reward_weights", name, names))
        if not isinstance(weight, NUMBERS) or not math.isfinite(weight):
            raise ConfigError(f"reward_weights: got {weight!r} for {name!r}, want a finite number.")
    return {name: float(weight) for name, weight in (weights or {}).items()}
