"""Arithmetic problems too large to do by heart: the task of the tool environments that have no data of their own."""

from __future__ import annotations

import numpy as np

from llm_gym.envs.arithmetic import OPERATIONS, SPLITS, Problem, split_of
from llm_gym.errors import ConfigError, unknown


class Problems:
    """Problems by operations, digits and split.

    Args:
        operations: which of `+`, `-`, `*` to draw from, as one string.
        digits_min: fewest digits of an operand.
        digits_max: most digits of an operand.
        split: `train`, `test` (the tenth of all problems that `arithmetic.split_of` holds back) or `all`.

    Raises:
        ConfigError: an unknown operation or split, or a range of digits that is none.
    """

    def __init__(self, operations: str, digits_min: int, digits_max: int, split: str) -> None:
        for op in operations or " ":
            if op not in OPERATIONS:
                raise ConfigError(unknown("operations", op, OPERATIONS))
        if split not in SPLITS:
            raise ConfigError(unknown("split", split, SPLITS))
        if not 1 < digits_min <= digits_max <= 15:
            raise ConfigError(f"digits_min, digits_max: got {digits_min} and {digits_max}, want 2 <= min <= max <= 15.")
        self.operations, self.digits, self.split = operations, (digits_min, digits_max), split

    def draw(self, rng: np.random.Generator) -> Problem:
        """A problem of the split; differences are not negative."""
        while True:
            op = self.operations[int(rng.integers(len(self.operations)))]
            a, b = (self._operand(rng) for _ in range(2))
            problem = Problem(max(a, b), op, min(a, b)) if op == "-" else Problem(a, op, b)
            if self.split in ("all", split_of(problem)):
                return problem

    def _operand(self, rng: np.random.Generator) -> int:
        digits = int(rng.integers(self.digits[0], self.digits[1] + 1))
        return int(rng.integers(10 ** (digits - 1), 10**digits))
