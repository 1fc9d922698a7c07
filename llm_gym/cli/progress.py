"""The progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from llm_gym.report.scale import duration, short

LINES = 12
"""Lines of a run that is not watched on a terminal, evaluations apart."""
RECENT = 20
"""Steps whose times predict the rest."""


class TrainProgress:
    """An observer of the trainer.

    Args:
        console: where to show it; None: standard error.
        unit: what one step's progress counts, by phase.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.step = self.total = 0
        self._metrics: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_start(self, config: Any, total_steps: int, first_step: int = 0) -> None:
        """The run begins, after `first_step` steps of `total_steps`."""
        self.step, self.total = first_step, total_steps
        if self.console.is_terminal:
            words = (TextColumn("{task.description:<16}"), BarColumn(bar_width=None), MofNCompleteColumn())
            self._bar = Progress(*words, TextColumn("{task.fields[words]}"), console=self.console, transient=True)
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step, words="")
            self._bar.start()

    def on_phase(self, name: str) -> None:
        """The run turns to `rollout`, `train`, `eval` and so on."""
        self._show(name)

    def on_progress(self, name: str, done: int, total: int) -> None:
        """Within a phase, `done` of `total` episodes or micro-batches are finished."""
        self._show(f"{name} {done}/{total}")

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """A row of metrics was written; the row of step 0 is the evaluation before the first."""
        self.step = int(metrics["step"])
        self._metrics |= {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        if math.isfinite(seconds := self._metrics.get("time/step", math.nan)) and self.step:
            self._seconds.append(seconds)
        if "eval/greedy_reward" in metrics or "eval/sampled_reward" in metrics:
            self.console.print(f"step {self.step}/{self.total}: {evaluation(metrics)}")
        elif self._bar is None and (self.step % max(1, self.total // LINES) == 0):
            self.console.print(f"step {self.step}/{self.total}: {self.words()}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, words=self.words())

    def on_end(self, summary: Any = None) -> None:
        """The run is over, whichever way."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def words(self) -> str:
        """Reward, speed and time left."""
        parts = []
        for name, form in (("reward/mean", "reward {:.3f}"), ("tokens_per_second/rollout", "{} tokens/s")):
            if math.isfinite(value := self._metrics.get(name, math.nan)):
                parts.append(form.format(value if name == "reward/mean" else short(value)))
        if self._seconds and self.step < self.total:
            left = sum(self._seconds) / len(self._seconds) * (self.total - self.step)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def _show(self, phase: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=phase)


def evaluation(metrics: Mapping[str, Any]) -> str:
    """One line on an evaluation."""
    names = (("greedy", "eval/greedy_reward"), ("sampled", "eval/sampled_reward"))
    return "unseen problems, " + ", ".join(f"{word} {metrics[k]:.3f}" for word, k in names if metrics.get(k) is not None)
