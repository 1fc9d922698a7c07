"""`Arithmetic-v0`: procedural sums. The default task, two-digit addition, is the embedded model's."""

from __future__ import annotations

import operator
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np

from llm_gym.core import Messages
from llm_gym.env import Reply, TextEnv
from llm_gym.envs.grading import verify
from llm_gym.errors import ConfigError, unknown

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SPLITS = ("train", "test", "all")


class Problem(NamedTuple):
    """Two whole numbers and the operation between them."""

    a: int
    op: str
    b: int

    @property
    def question(self) -> str:
        """The user message."""
        return f"What is {self.a} {self.op} {self.b}?"

    @property
    def answer(self) -> int:
        """The exact result."""
        return OPERATIONS[self.op](self.a, self.b)


def split_of(problem: tuple[int, str, int]) -> Literal["train", "test"]:
    """Which split a problem belongs to: about one in ten is `test`.

    It is decided by a hash of the problem alone, so that a problem is unseen for every corpus and
    run, whatever its knobs, and no pattern of digits is missing from training. `a + b` and `b + a`
    fall on the same side.
    """
    a, op, b = problem
    if op != "-" and a > b:
        a, b = b, a
    digest = blake2b(f"{a}{op}{b}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def worked(problem: tuple[int, str, int]) -> str:
    """A reply in the expected style; an addition is worked column by column, from the units up.

    >>> worked((47, "+", 38))
    '7+8=15, 4+3+1=8. Answer: 85'
    """
    a, op, b = problem
    answer = f"Answer: {OPERATIONS[op](a, b)}"
    if op != "+":
        return answer
    columns: list[str] = []
    carry = 0
    while a or b or not columns:
        digits = f"{a % 10}+{b % 10}" + "+1" * carry
        total = a % 10 + b % 10 + carry
        columns.append(f"{digits}={total}")
        a, b, carry = a // 10, b // 10, total // 10
    return f"{', '.join(columns)}. {answer}"


class Arithmetic(TextEnv):
    """One question, `What is 47 + 38?`; the reply's final number must be exactly right.

    The answer is read as `envs.grading.verify` does: the last `Answer: N`, or else the last number.

    Args:
        operations: which of `+`, `-`, `*` to draw from, as one string.
        digits_min: fewest digits of an operand.
        digits_max: most digits of an operand.
        split: `train`, `test` (the tenth of all problems that `split_of` holds back) or `all`.
        worked_example: add one worked problem, in the expected style, to the question.
        kwargs: the common arguments of `TextEnv`.

    Reward component: `correct`, 1 or 0. A difference is never negative: the larger number comes first.
    """

    reward_names = ("correct",)
    eval_args = {"split": "test"}  # noqa: RUF012

    def __init__(
        self,
        *,
        operations: str = "+",
        digits_min: int = 2,
        digits_max: int = 2,
        split: str = "train",
        worked_example: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for op in operations or " ":
            if op not in OPERATIONS:
                raise ConfigError(unknown("operations", op, OPERATIONS))
        if split not in SPLITS:
            raise ConfigError(unknown("split", split, SPLITS))
        if not 1 <= digits_min <= digits_max <= 15:
            raise ConfigError(f"digits_min, digits_max: got {digits_min} and {digits_max}, want 1 <= min <= max <= 15.")
        self.operations, self.split, self.worked_example = operations, split, worked_example
        self.digits = (digits_min, digits_max)
        self._draw(np.random.default_rng(0), split)  # an empty split is found now, not at some reset

    def open(self) -> Messages:
        """The question; row i of `options={"task": i}` is the problem drawn by a generator seeded i."""
        rng = self.np_random if self.task is None else np.random.default_rng(self.task)
        self.problem = self._draw(rng, self.split)
        question = self.problem.question
        if self.worked_example:
            example = self._draw(rng, "train")
            question += f"\nWork like this: {example.question} {worked(example)}"
        self._gold = str(self.problem.answer)
        return [{"role": "user", "content": question}]

    def reply(self, text: str) -> Reply:
        """Grades the answer; the episode is over."""
        return Reply(reward={"correct": verify(self._gold, text, kind="number").score}, done=True)

    def _draw(self, rng: np.random.Generator, split: str) -> Problem:
        """A problem of `split`.

        Raises:
            ConfigError: ten thousand draws found none.
        """
        low, high = self.digits
        for _ in range(10_000):
            op = self.operations if len(self.operations) == 1 else self.operations[rng.integers(len(self.operations))]
            a, b = _operand(rng, low, high), _operand(rng, low, high)
            if op == "-" and a < b:
                a, b = b, a
            problem = Problem(a, op, b)
            if split in ("all", split_of(problem)):
                return problem
        raise ConfigError(f"split: no {split!r} problem of {low} to {high} digits with operations {self.operations!r}.")


def _operand(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number of `low` to `high` digits, every number of digits as likely as the others."""
    digits = low if low == high else int(rng.integers(low, high + 1))
    return int(rng.integers(10 ** (digits - 1), 10**digits))
