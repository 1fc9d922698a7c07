"""The progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llm_gym.harness.settings import to_dict
from llm_gym.report.run import problems
from llm_gym.report.scale import duration, short

LINES = 12
"""Lines about training in a run that nobody watches on a terminal; evaluations come on top."""
RECENT = 20
"""Steps whose times predict the rest."""
PHASES = {
    "load": "loading {model}",
    "engine": "starting the engine",
    "eval": "playing {total} episodes of evaluation",
    "rollout": "playing {total} episodes of training",
    "train": "training on them",
    "sync": "sending the new weights to the engine",
    "save": "saving",
}
"""What a phase does, in words; where there is no bar, said the first time."""


class TrainProgress:
    """An observer of the trainer; `console` is where it shows things, standard error if None."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.run: Path | None = None
        self.step = self.steps = 0
        self._phase, self._units, self._problems = "", 0, ""
        self._row: Mapping[str, Any] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._model, self._said = "", set[str]()

    def on_start(self, config: Any, run: Path, step: int) -> None:
        """The run begins, or goes on, at `step`."""
        self.run, self.step, self.steps = run, step, config.steps
        self._model = config.model or "the embedded model"
        rate = config.rates.words(config.optimizer)
        click.echo(f"{config.title}, {self._model}, {config.steps} steps -> {run}, {rate}")
        self._problems = problems(to_dict(config))
        if self.console.is_terminal:
            columns = (TextColumn("{task.description:<15}"), BarColumn(30), MofNCompleteColumn())
            words = TextColumn("{task.fields[words]}")
            self._bar = Progress(*columns, words, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=self.steps, completed=step, words="")
            self._bar.start()

    def on_phase(self, name: str, total: int) -> None:
        """A phase of `total` units begins."""
        self._phase, self._units = name, total
        self._update(description=name)
        if self._bar is None and name not in self._said:
            self.console.print(f"{PHASES.get(name, name).format(model=self._model, total=total)} ...")
        self._said.add(name)

    def on_progress(self, done: int) -> None:
        """So many units of the phase are done."""
        self._update(description=f"{self._phase} {done}/{self._units}")

    def on_note(self, text: str) -> None:
        """Something was decided that a person should know."""
        self.console.print(text)

    def on_row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics was written; step 0 is the evaluation before the first step."""
        self._row, self.step = row, int(row["step"])
        if self.step and _number(row, "time/step") is not None:
            self._seconds.append(float(row["time/step"]))
        said = [self.words()] if self._bar is None and self.step % max(1, self.steps // LINES) == 0 else []
        for text in filter(None, [*said, evaluation(row, self._problems)]):
            self.console.print(f"step {self.step}/{self.steps}: {text}")
        self._update(completed=self.step, words=self.words())

    def on_end(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The run is complete."""
        self.stop()

    def stop(self) -> None:
        """Takes the bar away; also for a run that was interrupted or failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def words(self) -> str:
        """Reward, speed and time left, as far as they are known."""
        parts = []
        if (reward := _number(self._row, "reward/mean")) is not None:
            parts.append(f"reward {reward:.3f}")
        if (speed := _number(self._row, "tokens_per_second/rollout")) is not None:
            parts.append(f"{short(speed)} tokens/s")
        if self._seconds and self.step < self.steps:
            mean = sum(self._seconds) / len(self._seconds)
            parts.append(f"{duration(mean * (self.steps - self.step))} left")
        return ", ".join(parts)

    def _update(self, **fields: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, **fields)


def evaluation(row: Mapping[str, Any], on: str) -> str:
    """A row's evaluation in words, further environments after the run's own; empty if it has none."""
    others = [match[1] for name in row if (match := re.fullmatch(r"eval/([^/]+)/greedy_reward", name))]
    own = _measured(row, "eval/")
    parts = [f"reward on {on}: {own}"] if own else []
    return "; ".join(parts + [f"{name}: {said}" for name in others if (said := _measured(row, f"eval/{name}/"))])


def _measured(row: Mapping[str, Any], prefix: str) -> str:
    """Greedy and sampled reward, and pass@k of the largest k."""
    names = {word: f"{prefix}{word}_reward" for word in ("greedy", "sampled")}
    ks = [int(name.rpartition("@")[2]) for name in row if name.startswith(f"{prefix}pass@")]
    names |= {f"pass@{max(ks)}": f"{prefix}pass@{max(ks)}"} if ks else {}
    return ", ".join(f"{word} {value:.3f}" for word, name in names.items() if (value := _number(row, name)) is not None)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """A metric, if the row has it (one that is not finite is null)."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def counter(name: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """A bar of `total` units on a terminal, nothing elsewhere; the function it gives counts one unit."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console or Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
