"""Bounds of numeric settings, stated beside the fields that they hold for.

    steps: Annotated[int, Within("[1, inf)")] = 120

The notation is that of intervals: a square bracket includes the end, a round one leaves it out; `inf]` allows
infinity. A number whose field states nothing must be finite.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Real
from typing import Any

from llm_gym.errors import ConfigError


@dataclass(frozen=True)
class Within:
    """An interval, such as `[0, 1)`."""

    interval: str

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Its two ends."""
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; NaN lies in none."""
        low, high = self.ends
        above = value >= low if self.interval[0] == "[" else value > low
        return above and (value <= high if self.interval[-1] == "]" else value < high)

    @cached_property
    def words(self) -> str:
        """What is wanted, in words."""
        if re.search(r"inf.$", self.interval):
            edge = self.interval[1:-1].split(",")[0].strip()
            words = f"at least {edge}" if self.interval[0] == "[" else f"a value > {edge}"
            return "a finite number" if edge == "-inf" else words
        return f"a value in {self.interval}"


ANY = Within("(-inf, inf)")
"""What a number lies in whose field states nothing."""


def check_bounds(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Looks at every number among the values of a dataclass's fields, those in tuples too.

    Args:
        cls: the dataclass.
        values: field -> value; defaults need not be among them.
        where: what the fields' names follow in sentences, such as `optimizer.`.

    Raises:
        ConfigError: one that is no number, or not within its field's bounds.
    """
    stated = _stated(cls)
    for name, value in values.items():
        bounds, others = stated[name]
        for number in value if isinstance(value, tuple | list) else (value,):
            if _numeric(number):
                ok = (bounds or ANY).holds(number)
            else:
                ok = bounds is None or number is None or number in others
            if not ok:
                finite = "a finite number, " if bounds and bounds.ends[1] == number else ""
                words = ", or ".join([(bounds or ANY).words, *others])
                raise ConfigError(f"{where}{name}: got {value!r}, want {finite}{words}.")


def _numeric(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


@cache
def _stated(cls: type) -> Mapping[str, tuple[Within | None, tuple[str, ...]]]:
    """Field -> its bounds if it states some, and words that it may be instead of a number."""
    found: dict[str, tuple[Within | None, tuple[str, ...]]] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if typing.get_origin(hint) is typing.Annotated:
            inner, *marks = typing.get_args(hint)
            bounds = next(mark for mark in marks if isinstance(mark, Within))
            literals = [o for o in typing.get_args(inner) if typing.get_origin(o) is typing.Literal]
            found[name] = bounds, tuple(str(word) for option in literals for word in typing.get_args(option))
        elif typing.get_origin(hint) is not typing.ClassVar:
            found[name] = None, ()
    return found
