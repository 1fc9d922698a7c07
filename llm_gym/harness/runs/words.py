"""What a run is told in: numbers and spans of time as people read them, and what its evaluations are on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium

from llm_gym.envs import NAMESPACE
from llm_gym.envs.parameters import environment_class

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_FILES = (".jsonl", ".json", ".parquet", ".csv")


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


def problems(config: Mapping[str, Any]) -> str:
    """What a run's evaluations are on: `unseen problems`, unless training may have met them (see `drawn`).

    A local file is one split, so that evaluation draws from the same rows unless it was given its own
    data (`eval.env_args`); the same holds for `Dataset-v0`, which knows no test split.
    """
    first = {"env": config.get("env"), **next(iter(config.get("envs") or ()), {})}
    args = {**(config.get("env_args") or {}), **(first.get("env_args") or {})}
    other = (config.get("eval") or {}).get("env_args") or {}
    data = args.get("dataset")
    if "dataset" in other or "split" in other:
        return "unseen problems"
    if data is None:
        return drawn(first["env"])
    one_split = data == "sample" or Path(str(data)).suffix in _FILES or str(first["env"]).endswith("Dataset-v0")
    return "training problems" if one_split else "unseen problems"


def drawn(env: str | None) -> str:
    """What the problems are that an environment draws from the seeds of evaluation.

    >>> drawn("Arithmetic-v0"), drawn("GuessNumber-v0")
    ('unseen problems', 'problems of unseen seeds')

    One that holds problems back says so in `eval_args`; of others, another seed may have given the same problem. No
    module of a user's own is imported for this.
    """
    bare = str(env).rpartition(":")[2]
    full = next((name for name in (bare, f"{NAMESPACE}/{bare}") if name in gymnasium.registry), None)
    held_back = full is not None and getattr(environment_class(full), "eval_args", None)
    return "unseen problems" if held_back else "problems of unseen seeds"
