"""What the groups of a step play: an environment, a seed, and perhaps a row of its data.

Nothing here knows who plays them: every process of a run that makes the same calls gets the same tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from llm_gym.core import Group, Task
from llm_gym.harness.data.curriculum import Curriculum, check_drawn

ROUNDING = 1e-6
"""How far below its mark a return still passes: weighted components do not sum exactly."""


def task_seeds(run_seed: int, step: int, first: int, count: int) -> list[int]:
    """The seeds of a step's tasks, from number `first` on: a function of the run's seed and the step alone."""
    state = np.random.SeedSequence([run_seed, step]).generate_state(first + count)
    return [int(seed) for seed in state[first:]]


class Dealer:
    """Deals turns in proportion to weights: after any number of them each has had its share to within one.

    R. Tijdeman, The chairman assignment problem, https://doi.org/10.1016/0012-365X(80)90269-1: of those that are far
    enough behind, the one that must come soonest. With k shares nobody is ever off by more than 1 - 1 / (2k - 2).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self.counts = [0] * len(exact)

    def deal(self, count: int) -> list[int]:
        """Whose turn the next `count` are."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        least = Fraction(1, max(2 * len(self.shares) - 2, 1))
        n = sum(self.counts) + 1
        behind = [share * n - count for share, count in zip(self.shares, self.counts, strict=True)]
        waiting = [i for i, lag in enumerate(behind) if lag >= least]
        chosen = min(waiting, key=lambda i: (1 - least - behind[i]) / self.shares[i])
        self.counts[chosen] += 1
        return chosen


class Tasks:
    """The tasks of a run, step by step.

    Args:
        seed: the run's.
        weights: how much of the run each environment gets.
        curricula: one for each environment; None: its tasks are drawn from seeds.
        pass_rewards: for each environment, the least return of an episode that passed.
    """

    def __init__(
        self,
        seed: int,
        weights: Sequence[float] = (1.0,),
        curricula: Sequence[Curriculum | None] = (None,),
        pass_rewards: Sequence[float] = (1.0,),
    ) -> None:
        self.seed, self.curricula, self.pass_rewards = seed, list(curricula), pass_rewards
        self._dealer = Dealer(weights)
        self.begin(0)

    def begin(self, step: int, drawn: int = 0, known: Iterable[Task] = ()) -> None:
        """A step begins, or goes on: its seeds are counted from `drawn` on, and the rows of `known` were drawn."""
        self._step, self._drawn = step, drawn
        self._rows: list[set[int]] = [set() for _ in self.curricula]
        for task in known:
            self._rows[task.env] |= set() if task.row is None else {task.row}

    def slots(self, count: int) -> list[int]:
        """The environments of a step's groups, in order."""
        return self._dealer.deal(count)

    def draw(self, envs: Sequence[int]) -> list[Task]:
        """The step's next tasks, one for each entry of `envs`."""
        seeds = task_seeds(self.seed, self._step, self._drawn, len(envs))
        self._drawn += len(envs)
        rows = [iter(self._draw_rows(env, list(envs).count(env))) for env in range(len(self.curricula))]
        return [Task(env, seed, next(rows[env])) for env, seed in zip(envs, seeds, strict=True)]

    def learn(self, played: Iterable[Group]) -> None:
        """Tells the curricula how the step's groups went."""
        for group in played:
            task = group.task
            curriculum = self.curricula[task.env]
            if curriculum is not None and task.row is not None:
                returns = group.rewards[~np.isnan(group.rewards)]
                passed = int((returns >= self.pass_rewards[task.env] - ROUNDING).sum())
                curriculum.learn(task.row, passed, len(returns) - passed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later tasks depend on, between two steps, as JSON has it."""
        return {
            "dealt": list(self._dealer.counts),
            "curricula": [None if c is None else c.state_dict() for c in self.curricula],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self._dealer.counts = list(state["dealt"])
        for curriculum, saved in zip(self.curricula, state["curricula"], strict=True):
            if curriculum is not None:
                curriculum.load_state_dict(saved)

    def _draw_rows(self, env: int, count: int) -> Sequence[int | None]:
        curriculum = self.curricula[env]
        if curriculum is None or not count:
            return [None] * count
        rows = curriculum.draw(count, self._rows[env])
        check_drawn(curriculum, rows, count)
        self._rows[env] |= set(rows)
        return rows
