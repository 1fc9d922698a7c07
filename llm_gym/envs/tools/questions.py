"""Questions with one right answer, for tool environments: of a data set, or arithmetic too large to do by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from llm_gym.core import Ids, Messages
from llm_gym.env import Reply, TextEnv
from llm_gym.envs.arithmetic import OPERATIONS, SPLITS, Problem, split_of
from llm_gym.envs.dataset import check_references
from llm_gym.envs.grading import verify
from llm_gym.envs.grading.verify import Kind
from llm_gym.envs.rows import Row, check_columns, load_rows
from llm_gym.envs.tools.env import ToolEnv
from llm_gym.envs.tools.schema import Tool
from llm_gym.errors import ConfigError, unknown


class Questions(Protocol):
    """Where an environment's questions come from."""

    @property
    def size(self) -> int | None:
        """Rows of the data set; None: questions are drawn."""
        ...

    @property
    def kind(self) -> Kind:
        """How answers are compared; `math` may wait for a worker."""
        ...

    def draw(self, env: TextEnv) -> tuple[str, str]:
        """The question and the reference answer of a new episode of `env`."""
        ...

    def score(self, gold: str, text: str) -> float:
        """1 if the reply states the reference answer, else 0."""
        ...


class Rows:
    """The questions of a data set.

    Args:
        rows: the data set.
        question: name of the question column.
        answer: name of the answer column.
        kind: `number`: an answer must be written as a number; `math`: it is anything equal to the reference.
    """

    def __init__(self, rows: Sequence[Row], question: str, answer: str, kind: Kind) -> None:
        self.kind = kind
        self.rows, self.question, self.answer, self.size = rows, question, answer, len(rows)

    def draw(self, env: TextEnv) -> tuple[str, str]:
        """The row asked for, or any."""
        row = self.rows[env.draw_task(self.size)]
        return str(row[self.question]), str(row[self.answer])

    def score(self, gold: str, text: str) -> float:
        """By `envs.grading.verify`."""
        return verify(gold, text, kind=self.kind).score


class Arithmetic:
    """Procedural problems; an answer must be written as a number.

    Args:
        operations: which of `+`, `-`, `*` to draw from, as one string.
        digits: fewest and most digits of an operand.
        split: `train`, `test` (the tenth of all problems that `arithmetic.split_of` holds back) or `all`.

    Raises:
        ConfigError: an unknown operation or split, or a range of digits that is none.
    """

    size = None
    kind: Kind = "number"

    def __init__(self, operations: str, digits: tuple[int, int], split: str) -> None:
        for op in operations or " ":
            if op not in OPERATIONS:
                raise ConfigError(unknown("operations", op, OPERATIONS))
        if split not in SPLITS:
            raise ConfigError(unknown("split", split, SPLITS))
        least, most = digits
        if not 1 < least <= most <= 15:
            raise ConfigError(f"digits_min, digits_max: got {least} and {most}, want 2 <= min <= max <= 15.")
        self.operations, self.digits, self.split = operations, digits, split

    def draw(self, env: TextEnv) -> tuple[str, str]:
        """A problem of the split; row i is the one drawn by a generator seeded i. Differences are not negative."""
        rng = env.np_random if env.task is None else np.random.default_rng(env.task)
        while True:
            op = self.operations[int(rng.integers(len(self.operations)))]
            a, b = (self._operand(rng) for _ in range(2))
            problem = Problem(max(a, b), op, min(a, b)) if op == "-" else Problem(a, op, b)
            if self.split in ("all", split_of(problem)):
                return problem.question, str(problem.answer)

    def score(self, gold: str, text: str) -> float:
        """By `envs.grading.verify`: an expression with the right value is no answer."""
        return verify(gold, text, kind="number").score

    def _operand(self, rng: np.random.Generator) -> int:
        digits = int(rng.integers(self.digits[0], self.digits[1] + 1))
        return int(rng.integers(10 ** (digits - 1), 10**digits))


def questions(
    dataset: str | None, split: str, columns: tuple[str, str], operations: str, digits: tuple[int, int]
) -> Questions:
    """The questions of `dataset` (columns of question and answer), or arithmetic if there is none.

    Raises:
        ConfigError: arithmetic that cannot be drawn.
        DataError: no such data, a missing column, or no answer in any row.
    """
    if dataset is None:
        return Arithmetic(operations, digits, split)
    rows = load_rows(dataset, split)
    check_columns(rows, dict(zip(("question", "answer"), columns, strict=True)))
    numbers = check_references(dataset, split, None, columns[1], numeric=False)
    return Rows(rows, *columns, kind="number" if numbers else "math")


class QuestionEnv(ToolEnv):
    """One question; the reply that calls no tool must hold the right answer.

    Args:
        tools: as for `ToolEnv`.
        dataset: a hub id or a local file with questions and answers; None: arithmetic too large to do by heart.
        split: of the data set; or `train`, `test` or `all` of the arithmetic problems.
        question: name of the question column.
        answer: name of the answer column: an answer, or a solution that ends in one. Where all of them are numbers, an
            answer must be written as one.
        operations: which of `+`, `-`, `*` to draw from, as one string.
        digits_min: fewest digits of an operand.
        digits_max: most digits of an operand.
        kwargs: the arguments of `ToolEnv` and the common ones of `TextEnv`.

    Reward components: `correct`, 1 or 0, and `format` and `tool_calls` of `ToolEnv`.

    Raises:
        ConfigError: arithmetic that cannot be drawn.
        DataError: no such data, a missing column, or no answer in any row.
    """

    reward_names = ("correct",)
    eval_args = {"split": "test"}  # noqa: RUF012

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        /,
        *,
        dataset: str | None = None,
        split: str = "train",
        question: str = "question",
        answer: str = "answer",
        operations: str = "+-*",
        digits_min: int = 3,
        digits_max: int = 4,
        **kwargs: Any,
    ) -> None:
        self._questions = questions(dataset, split, (question, answer), operations, (digits_min, digits_max))
        self.num_tasks = self._questions.size
        super().__init__(tools, **kwargs)
        if self.asynchronous and self._questions.kind == "math":
            self._threaded = True

    def release(self) -> None:
        """Ends what the tools hold for the episode; called when it is over, before the next, and at the end."""

    def open(self) -> Messages:
        """The question."""
        self.release()
        asked, self._gold = self._questions.draw(self)
        self.row = {"question": asked, "answer": self._gold}
        return [{"role": "user", "content": asked}]

    def final(self, text: str) -> Reply:
        """Grades the answer; the episode is over."""
        return Reply(reward={"correct": self._questions.score(self._gold, text)}, done=True)

    def step(self, action: Ids) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """As `TextEnv.step`."""
        result = super().step(action)
        if result[2] or result[3]:
            self._hooked(self.release)
        return result

    async def step_async(self, action: Ids) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """As `TextEnv.step_async`."""
        result = await super().step_async(action)
        if result[2] or result[3]:
            await self._hooked_async(self.release)
        return result

    def close(self) -> None:
        """Ends what the tools hold, and their thread."""
        self._hooked(self.release)
        super().close()
