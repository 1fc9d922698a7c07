"""`GSM8K-v0`: grade-school word problems with exact numeric answers (https://arxiv.org/abs/2110.14168)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llm_gym.core import Messages
from llm_gym.env import Reply, TextEnv
from llm_gym.envs.grading import verify
from llm_gym.envs.grading.numbers import parse
from llm_gym.envs.rows import check_columns, load_rows
from llm_gym.errors import DataError

INSTRUCTION = "Think step by step, and end with the final number after ####."


class GSM8K(TextEnv):
    """One word problem; the reply's final number must equal the reference exactly.

    Args:
        dataset: the hub id, a .jsonl, .json, .parquet or .csv file in the original schema (`question`,
            and `answer` ending in `#### N`), or `sample`: a dozen problems that ship with the package.
        split: a split of the hub data set, slices included (`train[:95%]`); for a file only the slice counts.
        instruction: a line put after the question; empty: the bare question.
        where: where the answer stands in the reply (see `envs.grading.verify`).
        question: name of the question column.
        answer: name of the answer column.
        max_tokens: most tokens in the reply.
        kwargs: the common arguments of `TextEnv`.

    Reward component: `correct`, 1 or 0.

    Raises:
        DataError: no such data, a missing column, or a reference that is no number.
    """

    reward_names = ("correct",)
    eval_args = {"split": "test"}  # noqa: RUF012

    def __init__(
        self,
        *,
        dataset: str = "openai/gsm8k",
        split: str = "train",
        instruction: str = INSTRUCTION,
        where: str = "auto",
        question: str = "question",
        answer: str = "answer",
        max_tokens: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_tokens=max_tokens, **kwargs)
        self.instruction, self.where = instruction, where
        self.problems = load_problems(dataset, split, question, answer)
        self.num_tasks = len(self.problems)
        verify("0", "", where=where, kind="number")  # an unknown policy is found now

    def open(self) -> Messages:
        """The question, and how to answer it."""
        question, self._gold = self.problems[self.draw_task(len(self.problems))]
        self.row = {"question": question, "answer": self._gold}
        return [{"role": "user", "content": f"{question}\n{self.instruction}" if self.instruction else question}]

    def reply(self, text: str) -> Reply:
        """Grades the answer; the episode is over."""
        return Reply(reward={"correct": verify(self._gold, text, where=self.where, kind="number").score}, done=True)


@lru_cache(maxsize=32)
def load_problems(dataset: str, split: str, question: str, answer: str) -> Sequence[tuple[str, str]]:
    """(question, reference number) of every row, checked once per process.

    Raises:
        DataError: as `load_rows`, or a reference that is no number.
    """
    rows = load_rows(dataset, split, name="main" if dataset == "openai/gsm8k" else None, sample="gsm8k.jsonl")
    check_columns(rows, {"question": question, "answer": answer})
    problems = []
    for index, row in enumerate(rows):
        gold = str(row[answer]).rpartition("####")[2].strip()
        if parse(gold) is None:
            raise DataError(f"answer: row {index} of {dataset!r} ends in {gold[-40:]!r}, want a number after '####'.")
        problems.append((str(row[question]), gold))
    return problems
