"""What somebody who watches a run is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_gym.errors import unknown
from llm_gym.harness.config import TrainConfig


class Observer:
    """Is told what happens in a run, and does nothing; define the methods that you need, in a subclass or alone.

    >>> class Rewards:
    ...     def on_row(self, row):
    ...         print(row["step"], row["reward/mean"])
    >>> listening(Rewards()).on_row({"step": 1, "reward/mean": 0.5})
    1 0.5
    """

    def on_start(self, config: TrainConfig, run: Path, step: int) -> None:
        """The run begins, or goes on, at `step`; its settings are sound, and nothing is loaded yet."""

    def on_phase(self, name: str, total: int) -> None:
        """A phase (`load`, `engine`, `rollout`, `train`, `sync`, `eval`, `save`) of `total` units begins."""

    def on_progress(self, done: int) -> None:
        """So many units of the phase are done."""

    def on_note(self, text: str) -> None:
        """Something was decided that a person should know."""

    def on_row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics was written."""

    def on_close(self) -> None:
        """The run is over: complete, interrupted or failed."""

    def on_end(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The run is complete; all its rows."""


def listening(observer: object | None) -> Observer:
    """An observer with every method: what `observer` lacks does nothing.

    Raises:
        TypeError: it has a method `on_...` that nobody calls; the text names the nearest that is called.
    """
    whole = Observer()
    if observer is None:
        return whole
    known = [name for name in vars(Observer) if name.startswith("on_")]
    for name in dir(observer):
        if name.startswith("on_") and name not in known:
            raise TypeError(unknown(f"observer: method of {type(observer).__name__}", name, known))
    for name in known:
        if hasattr(observer, name):
            setattr(whole, name, getattr(observer, name))
    return whole
