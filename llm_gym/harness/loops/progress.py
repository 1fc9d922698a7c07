"""How far a run is: a bar on a terminal, a line that is written anew in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import importlib
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.runs.words import duration, problems, short
from llm_gym.harness.settings import to_dict

LINES = 12
"""Lines about training in a run that nobody watches on a terminal; evaluations come on top."""
RECENT = 20
"""Steps whose times predict the rest."""
OFTEN = 0.2
"""Least seconds between two versions of a notebook's line."""
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
BEFORE = ("load", "engine")
"""Phases that are over before the first step; no bar moves in them."""


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def wanted(asked: bool | None = None) -> bool:
    """Whether progress is shown: as asked; else on a terminal and in a notebook."""
    return (sys.stdout.isatty() or in_notebook()) if asked is None else asked


def default_observer(observer: object | None) -> object | None:
    """An observer; if None, one that shows progress where it is `wanted`."""
    return TrainProgress() if observer is None and wanted() else observer


class Bar:
    """Steps that are done, and a few words about them.

    Args:
        name: what it stands in front of.
        steps: of the whole run.
        done: of them before.
        console: where it is; None: standard error, or the notebook.
        shown: whether anything is; False: every method does nothing.
    """

    def __init__(
        self, name: str, steps: int, done: int = 0, *, console: Console | None = None, shown: bool = True
    ) -> None:
        self.steps, self.shown = steps, shown
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._state = {"description": name, "completed": done, "words": ""}
        self._draw: Callable[..., None] | None = None
        self._end: Callable[[], None] = lambda: None

    @property
    def moving(self) -> bool:
        """Whether there is something that moves, so that lines need not say it."""
        return self._draw is not None

    def start(self) -> None:
        """Puts a bar there, where one can move; once."""
        if self.shown and not self.moving and (in_notebook() or self.console.is_terminal):
            self._draw, self._end = _line(self.steps) if in_notebook() else _rich(self.steps, self.console)
            self._draw(**self._state)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            self.console.print(text, highlight=False)

    def show(self, **state: Any) -> None:
        """Changes the `description`, the steps `completed`, or the `words`."""
        self._state |= state
        if self._draw is not None:
            self._draw(**self._state)

    def step(self, done: int, words: str, note: str = "") -> None:
        """So many steps are done; the note, and where nothing moves now and then the words, become a line."""
        said = [words] if not self.moving and done % max(1, self.steps // LINES) == 0 else []
        for text in filter(None, [*said, note]):
            self.say(f"step {done}/{self.steps}: {text}")
        self.show(completed=done, words=words)

    def stop(self) -> None:
        """Takes it away; also from a run that was interrupted or failed. It can be started again."""
        self._draw = None
        self._end()
        self._end = lambda: None


def _rich(steps: int, console: Console) -> tuple[Callable[..., None], Callable[[], None]]:
    """A bar on a terminal: what draws it anew, and what takes it away."""
    columns = (TextColumn("{task.description:<15}"), BarColumn(30), MofNCompleteColumn())
    bar = Progress(*columns, TextColumn("{task.fields[words]}"), console=console, transient=True)
    task = bar.add_task("", total=steps, words="")
    bar.start()
    return lambda **state: bar.update(task, **state), bar.stop


def _line(steps: int) -> tuple[Callable[..., None], Callable[[], None]]:
    """A notebook's line, the last version of which stays: what writes it anew, and what writes it for good."""
    display = importlib.import_module("IPython.display").display
    written, last, text = display({"text/plain": ""}, raw=True, display_id=True), 0.0, ""

    def end() -> None:
        written.update({"text/plain": text}, raw=True)

    def draw(description: str, completed: int, words: str) -> None:
        nonlocal last, text
        full = round(30 * completed / max(1, steps))
        text = f"{description:<15} {'━' * full}{'┄' * (30 - full)} {completed}/{steps} {words}"
        if time.monotonic() - last > OFTEN:
            last = time.monotonic()
            end()

    return draw, end


class TrainProgress(Observer):
    """An observer of the trainer that shows how far it is; `console` is where, standard error if None."""

    def __init__(self, console: Console | None = None) -> None:
        self.bar = Bar("", 0, console=console)
        self.run: Path | None = None
        self.step = self.steps = 0
        self._phase, self._units, self._problems = "", 0, ""
        self._row: Mapping[str, Any] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._model, self._said = "", set[str]()

    def on_start(self, config: Any, run: Path, step: int) -> None:
        """The run begins, or goes on, at `step`."""
        self.run, self.step, self.steps = run, step, config.steps
        self._model = config.model or "the embedded model"
        rate = config.rates.words(config.optimizer)
        print(f"{config.title}, {self._model}, {config.steps} steps -> {run}, {rate}", flush=True)
        self._problems = problems(to_dict(config))
        self.bar = Bar("", self.steps, step, console=self.bar.console)

    def on_phase(self, name: str, total: int) -> None:
        """A phase of `total` units begins."""
        self._phase, self._units = name, total
        if name not in BEFORE:
            self.bar.start()
        self.bar.show(description=name)
        if not self.bar.moving and name not in self._said:
            self.bar.say(f"{PHASES.get(name, name).format(model=self._model, total=total)} ...")
        self._said.add(name)

    def on_progress(self, done: int) -> None:
        """So many units of the phase are done."""
        self.bar.show(description=f"{self._phase} {done}/{self._units}")

    def on_note(self, text: str) -> None:
        """Something was decided that a person should know."""
        self.bar.say(text)

    def on_row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics was written; step 0 is the evaluation before the first step."""
        self._row, self.step = row, int(row["step"])
        if self.step and _number(row, "time/step") is not None:
            self._seconds.append(float(row["time/step"]))
        self.bar.step(self.step, self.words(), evaluation(row, self._problems))

    def on_close(self) -> None:
        """The run is over, complete or not."""
        self.stop()

    def on_end(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The run is complete."""
        self.stop()

    def stop(self) -> None:
        """Takes the bar away; also for a run that was interrupted or failed."""
        self.bar.stop()

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
def counter(name: str, total: int | None, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """A bar of `total` units (None: nobody knows) on a terminal, nothing elsewhere; what it gives counts one unit."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console or Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
