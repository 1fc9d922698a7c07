"""Reads a run folder back, tolerating everything a running or killed run can leave behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_gym.errors import CheckpointError

Record = dict[str, Any]
"""One episode as `Episode.to_dict` wrote it."""


@dataclass(frozen=True, slots=True)
class Series:
    """The finite values of one metric, in order of steps; both lists have the same length."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.values)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds."""

    path: Path
    config: Mapping[str, Any]
    """The parsed configuration; empty if there is none."""
    config_text: str
    """The same as written."""
    metrics: Mapping[str, Series]
    """Metric name -> its finite values, in the order in which names first appear."""
    rows: Sequence[Mapping[str, Any]]
    """Its rows, one a step, in order."""
    timeline: Sequence[Mapping[str, Any]]
    """The rows of timeline.jsonl, in order; empty in runs of older versions."""
    last_step: int
    """The last step with a row; 0 if there is none."""
    train_files: Mapping[int, Path]
    """Step -> file of the episodes trained on."""
    eval_files: Mapping[int, Path]
    """Step -> file of the greedy episodes on unseen problems after that many steps."""

    def series(self, name: str) -> Series:
        """The values of a metric; empty if it was never logged or never finite."""
        return self.metrics.get(name, Series([], []))


def title(config: Mapping[str, Any]) -> str | None:
    """The environment that a run plays, or all of a mixture."""
    entries = config.get("envs") or ()
    names = [str(e.get("name") or e.get("env")) for e in entries if isinstance(e, Mapping)]
    return " + ".join(names) or config.get("env")


def read(folder: str | Path) -> Run:
    """Reads a run folder; only the folder itself must exist.

    Raises:
        CheckpointError: there is no such folder, or nothing of a run is in it.
    """
    path = Path(folder)
    config, metrics = path / "config.yaml", path / "metrics.jsonl"
    if not config.is_file() and not metrics.is_file():
        absent = "is a file" if path.is_file() else "does not exist"
        state = "holds neither config.yaml nor metrics.jsonl" if path.is_dir() else absent
        raise CheckpointError(f"run folder: {str(path)!r} {state}.")
    text = config.read_text("utf-8") if config.is_file() else ""
    rows = list(_lines(metrics)) if metrics.is_file() else []
    spans = path / "timeline.jsonl"
    return Run(
        path=path,
        config=_mapping(text),
        config_text=text,
        metrics=_series(rows),
        rows=list({_step(row): row for row in rows}.values()),
        timeline=list(_lines(spans)) if spans.is_file() else [],
        last_step=max((_step(row) for row in rows), default=0),
        train_files=_numbered(path, "step"),
        eval_files=_numbered(path, "eval"),
    )


def episodes(file: Path) -> list[Record]:
    """The episodes of one file, whole lines only."""
    return [record for record in _lines(file) if isinstance(record.get("trajectories", record.get("turns")), list)]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, a line each; a line that a killed run cut short is skipped."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("step", 0)
    return int(step) if _finite(step) else 0


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _series(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """Rows to columns; of two rows of one step the later wins (a resumed run may write it again)."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _finite(value):
                found.setdefault(name, {})[_step(row)] = float(value)
    return {name: Series(sorted(column), [column[s] for s in sorted(column)]) for name, column in found.items()}


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _numbered(path: Path, prefix: str) -> dict[int, Path]:
    """`episodes/<prefix>_000012.jsonl` by number, ascending."""
    found = {}
    for file in (path / "episodes").glob(f"{prefix}_*.jsonl"):
        if match := re.fullmatch(rf"{prefix}_(\d+)\.jsonl", file.name):
            found[int(match[1])] = file
    return dict(sorted(found.items()))
