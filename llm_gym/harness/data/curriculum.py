"""Curricula: which rows of an environment's data are played, and when.

`uniform` leaves it to the environment, which draws a row from the task's seed. The others name a row for every
group. What a curriculum draws is a function of the run's seed and of its state alone, and the state goes into the
checkpoint: who plays the groups, and how often the run was interrupted, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_gym.errors import ConfigError, place
from llm_gym.harness.bounds import Within
from llm_gym.harness.registry import by_name
from llm_gym.harness.settings import checked

Floats = npt.NDArray[np.float64]


@checked("curriculum")
@dataclass(frozen=True)
class CurriculumConfig:
    """Which rows of the data are played, and when."""

    name: str = "uniform"
    """`uniform` (each group draws its own), `epochs` (every row once, then all again in another order) or `difficulty`
    (rows near a pass rate first), or "package.module:function"."""
    target: Annotated[float, Within("(0, 1)")] = 0.5
    """`difficulty`: the pass rate that is looked for."""
    explore: Annotated[float, Within("[0, 1]")] = 0.1
    """`difficulty`: the share of draws in which every row is as likely as the others."""
    memory: Annotated[float, Within("[0, 1]")] = 0.8
    """`difficulty`: what earlier results of a row weigh when it is played again."""
    pass_reward: float = 1.0
    """`difficulty`: the least return of an episode that passed."""


class Curriculum(Protocol):
    """Draws rows; what a row of `CURRICULA` and a user's own function make."""

    def draw(self, count: int, avoid: Collection[int] = ()) -> list[int]:
        """The next `count` rows; `avoid` are those that the same step already plays."""

    def learn(self, row: int, passed: int, failed: int) -> None:
        """So many episodes of a row passed and failed."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, as JSON has it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""


class Epochs:
    """Every row once, in an order shuffled by (seed, epoch); then all of them again."""

    def __init__(self, rows: int, seed: tuple[int, ...], config: CurriculumConfig) -> None:
        self.rows, self.seed, self.drawn = rows, seed, 0

    def draw(self, count: int, avoid: Collection[int] = ()) -> list[int]:
        """The next rows of the epoch, and of the one after it."""
        first, self.drawn = self.drawn, self.drawn + count
        epochs = range(first // self.rows, (self.drawn - 1) // self.rows + 1)
        rows = np.concatenate([self.order(epoch) for epoch in epochs]) if count else np.empty(0, np.int64)
        start = first % self.rows
        return [int(row) for row in rows[start : start + count]]

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows as an epoch has them, int64 [rows]."""
        return np.random.default_rng([*self.seed, epoch]).permutation(self.rows)

    def learn(self, row: int, passed: int, failed: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """How many rows were drawn."""
        return {"rows": self.rows, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind them."""
        same_rows(self.rows, state)
        self.drawn = state["drawn"]


class Difficulty:
    """Rows whose pass rate is near the target are drawn more often; no row twice in a step.

    A row's pass rate is the mean of a Beta distribution: the prior has the target as its mean and weighs two
    episodes, so a row that was never played is the likeliest of all. Older results fade by `memory`.
    """

    def __init__(self, rows: int, seed: tuple[int, ...], config: CurriculumConfig) -> None:
        self.rows, self.seed, self.config = rows, seed, config
        self.passed, self.failed = np.zeros(rows), np.zeros(rows)
        self.drawn = 0

    def draw(self, count: int, avoid: Collection[int] = ()) -> list[int]:
        """Rows by their `probabilities`, without replacement; all rows are free again when none is left."""
        rng = np.random.default_rng([*self.seed, self.drawn])
        self.drawn += count
        chosen: list[int] = []
        barred = set(avoid)
        while len(chosen) < count:
            barred = set() if len(barred) >= self.rows else barred
            keys = np.log(self.probabilities()) + rng.gumbel(size=self.rows)  # the greatest k are a draw of k
            keys[list(barred)] = -np.inf
            best = np.argsort(-keys, kind="stable")[: min(count - len(chosen), self.rows - len(barred))]
            chosen += [int(row) for row in best]
            barred |= set(chosen)
        return chosen

    def rates(self) -> Floats:
        """The pass rate of every row, float64 [rows], in (0, 1)."""
        target = self.config.target
        return (2 * target + self.passed) / (2 + self.passed + self.failed)

    def probabilities(self) -> Floats:
        """How likely each row is to be drawn first, float64 [rows].

        Proportional to p^2t (1 - p)^2(1-t), which is greatest at the target t and p (1 - p), the variance of a pass,
        at t = 1/2; mixed with the uniform distribution.
        """
        p, t = self.rates(), self.config.target
        weights = p ** (2 * t) * (1 - p) ** (2 - 2 * t)
        share = self.config.explore
        mixed: Floats = (1 - share) * weights / weights.sum() + share / self.rows
        return mixed

    def learn(self, row: int, passed: int, failed: int) -> None:
        """Adds a group's results; nothing if no episode of it says anything."""
        if passed + failed:
            self.passed[row] = self.config.memory * self.passed[row] + passed
            self.failed[row] = self.config.memory * self.failed[row] + failed

    def state_dict(self) -> dict[str, Any]:
        """The rows that were played."""
        seen = np.flatnonzero(self.passed + self.failed)
        results = [[int(row), float(self.passed[row]), float(self.failed[row])] for row in seen]
        return {"rows": self.rows, "drawn": self.drawn, "results": results}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Knows them again."""
        same_rows(self.rows, state)
        self.drawn = state["drawn"]
        self.passed[:], self.failed[:] = 0.0, 0.0
        for row, passed, failed in state["results"]:
            self.passed[row], self.failed[row] = passed, failed


def same_rows(rows: int, state: dict[str, Any]) -> None:
    """Looks whether a curriculum's state, which older versions wrote without their number, is of so many rows.

    Raises:
        ValueError: it is not.
    """
    least = max((row + 1 for row, *_ in state.get("results", ())), default=0)
    if state.get("rows", max(least, rows)) != rows or least > rows:
        had = state.get("rows", f"at least {least}")
        raise ValueError(f"it is of {had} rows, the data has {rows}; go on with the data that the run began with")


def check_drawn(curriculum: Curriculum, drawn: Sequence[Any], count: int, rows: int | None = None) -> None:
    """Looks at what a curriculum drew: `count` row numbers, below `rows` where that is known.

    Raises:
        ConfigError: something else; names file and line.
    """
    most = math.inf if rows is None else rows
    if len(drawn) != count or not all(isinstance(row, int | np.integer) and 0 <= row < most for row in drawn):
        where, last = place(type(curriculum).draw), "" if rows is None else f", 0 to {rows - 1}"
        raise ConfigError(f"curriculum.name: {where} drew {list(drawn)!r:.80}, want the numbers of {count} rows{last}.")


CurriculumFn = Callable[[int, tuple[int, ...], CurriculumConfig], Curriculum]
"""(rows of the data, seed, settings) -> a curriculum."""

CURRICULA: dict[str, CurriculumFn | None] = {"uniform": None, "epochs": Epochs, "difficulty": Difficulty}


def curriculum(config: CurriculumConfig, env: str, rows: int | None, seed: tuple[int, ...]) -> Curriculum | None:
    """The curriculum of an environment with so many rows; None where the environment draws from the seed.

    Raises:
        ConfigError: an unknown name, or rows are to be named where there are none.
    """
    make: CurriculumFn | None = by_name("curriculum.name", config.name, CURRICULA)
    if make is None:
        return None
    if rows is None:
        raise ConfigError(
            f"curriculum.name: got {config.name!r}, but {env} has no rows to choose from; it draws its tasks from "
            "seeds, which is 'uniform'."
        )
    return make(rows, seed, config)
