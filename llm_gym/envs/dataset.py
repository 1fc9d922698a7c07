"""`Dataset-v0`: any data set and any reward function, named on the command line; no class to write."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

from llm_gym.concurrency import Runner, finish, is_async, wait
from llm_gym.core import Messages
from llm_gym.env import Reply, TextEnv, bad_reply
from llm_gym.envs.grading import verify
from llm_gym.envs.grading.verify import Kind, reference
from llm_gym.envs.rows import Row, check_columns, load_rows
from llm_gym.errors import (
    FAULTS,
    BadReply,
    ConfigError,
    DataError,
    LLMGymError,
    RewardError,
    described,
    function_of,
    place,
)

FORMS = ("Answer: %s", "%s", "\\boxed{%s}", "<answer>%s</answer>", '{"answer": "%s"}', "#### %s")
"""Replies that a reward is tried on."""
Score = float | Mapping[str, float]
RewardFunction = Callable[[str, Row], Score | Awaitable[Score]]
"""`score(text, row)`: the reply's text and the whole row -> a number, or named components. May be `async def`."""


class Dataset(TextEnv):
    """One row, one reply, one reward.

    Args:
        dataset: a hub id, or the path of a .jsonl, .json, .parquet or .csv file.
        reward: `math` (the default): 1 if the reply's answer equals the column `answer`, by `envs.grading.verify`
            (`number`, and wherever all of the column is numbers: the answer must be written as a number). Or the
            reward function `score(text, row)`: `package.module:function` or the function itself. Several: a mapping of
            component name -> function, or a list (each named after its function).
            A function may also return a mapping of component names to numbers.
            In a rollout none holds up another episode: those that are `async def` are awaited, all together; others are
            called in a thread of the episode's environment, and several threads may be in one at the same time.
        prompt: the column that holds the question, a string or a list of chat messages.
        answer: the column that holds the reference, for `reward=math` and `number`: an answer, or a solution that
            ends in one (`\\boxed{...}`, `#### ...`).
        where: where the answer stands in the reply, for `reward=math` and `number` (see `envs.grading.verify`).
        split: a split of the hub data set, slices included; for a file only the slice counts.
        config: the configuration of the hub data set, where it has several.
        kwargs: the common arguments of `TextEnv`; `reward_weights` weighs the components by name.

    Raises:
        DataError: no such data, no such column, or no reference in it.
        ConfigError: a reward function that cannot be imported or called.
        RewardError: a reward function raised (anything but `BadReply`) or gave no finite number, or two give
            a component of one name.
    """

    def __init__(
        self,
        *,
        dataset: str,
        reward: str | RewardFunction | Sequence[str | RewardFunction] | Mapping[str, str | RewardFunction] = "math",
        prompt: str = "prompt",
        answer: str = "answer",
        where: str = "auto",
        split: str = "train",
        config: str | None = None,
        **kwargs: Any,
    ) -> None:
        graded = next((kind for kind in GRADED if kind == reward), None)
        self._given, self._runner = graded is None, Runner()
        self._functions = {"correct": answers(answer, where, graded)} if graded else reward_functions(reward)
        super().__init__(**kwargs)
        self.prompt = prompt
        self._rows = load_rows(dataset, split, name=config)
        self.num_tasks = len(self._rows)
        check_columns(self._rows, {"prompt": prompt, "answer": answer} if graded else {"prompt": prompt})
        if graded and check_references(dataset, split, config, answer, numeric=graded == "number"):
            graded = "number"
            self._functions = {"correct": answers(answer, where, graded)}
        self.metadata = {**self.metadata, "blocking": graded == "math"}  # grading may wait for a worker

    def open(self) -> Messages:
        """The row's question as a user message, or its chat as it is."""
        self.row = self._rows[self.draw_task(len(self._rows))]
        prompt = self.row[self.prompt]
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        if isinstance(prompt, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in prompt) and prompt:
            return [dict(message) for message in prompt]
        raise DataError(f"prompt: column {self.prompt!r} holds {prompt!r:.80}, want a string or a list of messages.")

    def reply(self, text: str) -> Reply:
        """Scores the reply; the episode is over."""
        return self._paid(self._scores(text))

    async def reply_async(self, text: str) -> Reply:
        """Scores the reply, all functions at once; other episodes go on."""
        calls = [self._score_async(name, function, text) for name, function in self._functions.items()]
        return self._paid(await asyncio.gather(*calls, return_exceptions=True))

    @property
    def asynchronous(self) -> bool:
        """Whether there are reward functions of a user's: nobody knows how long they take."""
        return self._given or super().asynchronous

    @property
    def plain(self) -> Sequence[str]:
        """Reward functions that are no `async def`, beside others that are."""
        plain = [_called(name, function) for name, function in self._functions.items() if not is_async(function)]
        return plain if len(plain) < len(self._functions) else ()

    def _paid(self, scores: Iterable[dict[str, float] | BaseException]) -> Reply:
        """What the scores of all functions add up to; raises the first error that is not the reply's."""
        parts: dict[str, float] = {}
        bad = None
        for named in scores:
            if isinstance(named, BadReply):
                bad = named  # a component that is missing counts as 0
                continue
            if isinstance(named, BaseException):
                raise named
            if twice := parts.keys() & named.keys():
                raise RewardError(f"{self._name()}: two reward functions give the component {min(twice)!r}.")
            parts.update(named)
        return bad_reply(bad, parts) if bad else Reply(reward=parts, done=True)

    def close(self) -> None:
        """Ends the thread of plain reward functions."""
        self._runner.close()
        super().close()

    def rehearse(self) -> None:
        """Tries the reward on row 0, with a reply that gives what stands in the row, in several usual forms.

        Raises:
            ConfigError: it fails on each of them; names the row, and the file and line.
        """
        self.task, self.row = 0, self._rows[0]
        cells = [str(cell) for cell in self.row.values() if isinstance(cell, str | int | float)] or ["42"]
        first = None
        for form in FORMS:
            for cell in reversed(cells):  # the reference most often stands last
                try:
                    for name, function in self._functions.items():
                        self._rehearsed(name, function, form % cell)
                    return
                except RewardError as error:
                    first = first or error
                except BadReply:
                    pass
        if first is None:  # the function says of each that it is no reply to this row
            return
        cause = first.__cause__ or first
        functions = [f for f in self._functions.values() if getattr(f, "__name__", "") in str(first)]
        where = f" ({place(functions[0], cause)})" if functions else ""
        raise ConfigError(f"reward: tried on row 0 before the run, it fails on every reply{where}: {first}") from first

    def _rehearsed(self, name: str, function: RewardFunction, text: str) -> None:
        """Calls a reward function as a rollout will: in a thread, where not all works that does in the main one."""
        if not self._given or is_async(function):
            self._score(name, function, text)
            return
        with closing(Runner()) as thread:
            thread.call(self._score, None, name=name, function=function, text=text)

    def _scores(self, text: str) -> Iterator[dict[str, float] | BadReply]:
        for name, function in self._functions.items():
            try:
                yield self._score(name, function, text)
            except BadReply as error:
                yield error

    def _score(self, name: str, function: RewardFunction, text: str) -> dict[str, float]:
        """What a reward function gives for a reply, by component.

        Raises:
            RewardError: it raised, or gave what is no reward; an error of this package (a grader that cannot
                start) passes as it is.
        """
        try:
            value: Any = finish(function(text, self.row))
        except LLMGymError:
            raise
        except FAULTS as error:
            raise self._fault(name, function, error) from error
        return self._named(name, function, value)

    async def _score_async(self, name: str, function: RewardFunction, text: str) -> dict[str, float]:
        """The same, awaited."""
        try:
            value: Any = await wait(function(text, self.row) if is_async(function) else self._aside(function, text))
        except LLMGymError:
            raise
        except FAULTS as error:
            raise self._fault(name, function, error) from error
        return self._named(name, function, value)

    async def _aside(self, function: RewardFunction, text: str) -> Score:
        """What a plain function gives, in the environment's own thread."""
        return await wait(await self._runner.run(partial(function, text, self.row), None))

    def _fault(self, name: str, function: RewardFunction, error: BaseException) -> RewardError:
        """A reward function's exception, with its name and the episode's."""
        what = f"raised {described(error)} at {self._place()}"
        return RewardError(f"{self._name()}: reward function {_called(name, function)!r} {what}.")

    def _named(self, name: str, function: RewardFunction, value: Score) -> dict[str, float]:
        """A score by component."""
        named = value if isinstance(value, Mapping) else {name: value}
        giver = f" of function {_called(name, function)!r}"
        return {part: self._number(part, number, giver) for part, number in named.items()}


def _called(name: str, function: RewardFunction) -> str:
    return str(getattr(function, "__name__", name))


GRADED: tuple[Kind, ...] = ("math", "number")
"""The rewards that compare the reply's answer with a column."""


def answers(column: str, where: str, kind: Kind) -> RewardFunction:
    """The reward function that grades a reply's answer against a column.

    Raises:
        SettingError: an unknown `where`.
    """
    verify("0", "", where=where)

    def correct(text: str, row: Row) -> float:
        return verify(_text(row[column]), text, where=where, kind=kind).score

    return correct


@lru_cache(maxsize=32)
def check_references(dataset: str, split: str, config: str | None, answer: str, *, numeric: bool) -> bool:
    """Reads every reference, once per process; warns of rows that have none, as no reply to them can score.

    Returns:
        Whether all of them are numbers.

    Raises:
        DataError: no row has one, or (`numeric`) one is no number.
    """
    rows = load_rows(dataset, split, name=config)
    missing, numbers = [], True
    for index, row in enumerate(rows):
        try:
            found = reference(_text(row[answer]))
        except DataError:
            found = None
            missing.append(index)
        numbers = numbers and not isinstance(found, str)
        if numeric and not isinstance(found, int | Fraction):
            raise DataError(f"answer: row {index} of {dataset!r} has {_text(row[answer])[-40:]!r}, want a number.")
    if len(missing) == len(rows):
        raise DataError(f"answer: no row of {dataset!r} has an answer in column {answer!r}.")
    if missing:
        warnings.warn(
            f"answer: {len(missing)} of {len(rows)} rows of {dataset!r} state none (row {missing[0]} first).",
            stacklevel=2,
        )
    return numbers


def _text(value: Any) -> str:
    """A cell as text; an absent value is empty."""
    return "" if value is None else str(value)


def reward_functions(reward: Any) -> dict[str, RewardFunction]:
    """Component name -> function, for every accepted form of the `reward` argument.

    Raises:
        ConfigError: one cannot be imported or called.
    """
    if isinstance(reward, Mapping) and reward:
        return {str(name): _function(function) for name, function in reward.items()}
    if not isinstance(reward, Mapping | Sequence) and not callable(reward):
        raise ConfigError(f"reward: got {reward!r}, want 'package.module:function', a list or a mapping of them.")
    single = isinstance(reward, str) or callable(reward)
    functions = [_function(function) for function in ([reward] if single else reward)]
    names = [getattr(function, "__name__", "reward") for function in functions]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"reward: got functions named {names}, want at least one, each with its own name.")
    return {"reward" if single else name: function for name, function in zip(names, functions, strict=True)}


def _function(reward: Any) -> RewardFunction:
    """A reward function, imported if it is given as `package.module:function`."""
    return reward if callable(reward) else function_of("reward", str(reward))  # type: ignore[no-any-return]
