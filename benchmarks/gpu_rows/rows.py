"""A row: what is run, what it needs, how long it may take; and what a row finds, figure by figure."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Value = float | str


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a row runs."""

    device: str
    """`cuda`, or `cpu`: a small form of the same."""
    folder: Path
    """For files; deleted afterwards."""

    @property
    def small(self) -> bool:
        """Whether shapes are tiny."""
        return self.device == "cpu"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    part: str
    """`1a`, `1b` ...: what is run together; a part takes three minutes at most."""
    what: str
    """What is looked at, in a few words."""
    run: str
    """`module:function` of (Setting, Found) -> None; imported in the row's own process."""
    limit: float
    """Seconds on a GPU."""
    needs: tuple[str, ...] = ()
    """Keys of `NEEDS`."""


class Found:
    """What a row has found; `tell` hears every figure at once, so that a row that hangs later has not lost it.

    Args:
        tell: (name, value, what is wrong with it, or "").
    """

    def __init__(self, tell: Callable[[str, Value, str], None]) -> None:
        self.tell = tell

    def add(self, name: str, value: Value, *, least: float = -math.inf, most: float = math.inf) -> None:
        """A figure, and the bounds that it must keep; NaN keeps none."""
        wrong = ""
        if not isinstance(value, str):
            value = float(value)
            wrong = "" if least <= value <= most else f"{name}: {show(value)}, want {between(least, most)}"
        self.tell(name, value, wrong)

    def holds(self, name: str, right: bool) -> None:
        """Something that is or is not so."""
        self.tell(name, "yes" if right else "no", "" if right else f"not: {name}")


def show(value: Value) -> str:
    """A figure in a few characters."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def between(least: float, most: float) -> str:
    """Bounds in words."""
    words = [f"at least {show(least)}"] * (least > -math.inf) + [f"at most {show(most)}"] * (most < math.inf)
    return " and ".join(words) or "a number"


def _devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _installed(package: str) -> Callable[[str], bool]:
    return lambda device: importlib.util.find_spec(package) is not None


NEEDS: dict[str, Callable[[str], bool]] = {
    "CUDA": lambda device: device == "cuda" and _devices() > 0,
    "2 GPUs": lambda device: device == "cpu" or _devices() > 1,
    "vllm": _installed("vllm"),
    "trl": _installed("trl"),
    "bitsandbytes": _installed("bitsandbytes"),
}
"""Name -> whether it is here; on a CPU two processes need no second device."""


def missing(row: Row, device: str) -> list[str]:
    """What a row needs and does not have; on `cuda` each needs CUDA."""
    wanted = dict.fromkeys([*(["CUDA"] if device == "cuda" else []), *row.needs])
    return [name for name in wanted if not NEEDS[name](device)]
