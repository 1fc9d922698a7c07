"""`Dataset-v0`: any data set and any reward function, named on the command line; no class to write."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_gym.core import Messages
from llm_gym.env import Reply, TextEnv
from llm_gym.envs.rows import Row, check_columns, load_rows
from llm_gym.errors import ConfigError, DataError, RewardError, unknown

RewardFunction = Callable[[str, Row], float | Mapping[str, float]]
"""`score(text, row)`: the reply's text and the whole row -> a number, or named components."""


class Dataset(TextEnv):
    """One row, one reply, one reward.

    Args:
        dataset: a hub id, or the path of a .jsonl, .json, .parquet or .csv file.
        reward: the reward function `score(text, row)`: `package.module:function` or the function
            itself. Several: a mapping of component name -> function, or a list (each named after its function).
            A function may also return a mapping of component names to numbers.
        prompt: the column that holds the question, a string or a list of chat messages.
        split: a split of the hub data set, slices included; for a file only the slice counts.
        config: the configuration of the hub data set, where it has several.
        kwargs: the common arguments of `TextEnv`; `reward_weights` weighs the components by name.

    Raises:
        DataError: no such data, or no such column.
        ConfigError: a reward function that cannot be imported or called.
        RewardError: two functions give a component of the same name.
    """

    def __init__(
        self,
        *,
        dataset: str,
        reward: str | RewardFunction | Sequence[str | RewardFunction] | Mapping[str, str | RewardFunction],
        prompt: str = "prompt",
        split: str = "train",
        config: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._functions = reward_functions(reward)
        super().__init__(**kwargs)
        self.prompt = prompt
        self._rows = load_rows(dataset, split, name=config)
        self.num_tasks = len(self._rows)
        check_columns(self._rows, {"prompt": prompt})

    def open(self) -> Messages:
        """The row's question as a user message, or its chat as it is."""
        self._row = self._rows[self.draw_task(len(self._rows))]
        prompt = self._row[self.prompt]
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        if isinstance(prompt, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in prompt) and prompt:
            return [dict(message) for message in prompt]
        raise DataError(f"prompt: column {self.prompt!r} holds {prompt!r:.80}, want a string or a list of messages.")

    def reply(self, text: str) -> Reply:
        """Scores the reply; the episode is over."""
        parts: dict[str, float] = {}
        for name, function in self._functions.items():
            value = function(text, self._row)
            named = value if isinstance(value, Mapping) else {name: value}
            if twice := parts.keys() & named.keys():
                raise RewardError(f"reward: two functions give the component {min(twice)!r}.")
            parts.update(named)
        return Reply(reward=parts, done=True)


def reward_functions(reward: Any) -> dict[str, RewardFunction]:
    """Component name -> function, for every accepted form of the `reward` argument.

    Raises:
        ConfigError: one cannot be imported or called.
    """
    if isinstance(reward, Mapping):
        return {str(name): _function(function) for name, function in reward.items()}
    single = isinstance(reward, str) or callable(reward)
    functions = [_function(function) for function in ([reward] if single else reward)]
    names = [getattr(function, "__name__", "reward") for function in functions]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"reward: got functions named {names}, want at least one, each with its own name.")
    return {"reward" if single else name: function for name, function in zip(names, functions, strict=True)}


def _function(reward: Any) -> RewardFunction:
    """A reward function, imported if it is given as `package.module:function`."""
    if callable(reward):
        return reward  # type: ignore[no-any-return]
    module_name, colon, name = str(reward).partition(":")
    if not colon:
        raise ConfigError(f"reward: got {reward!r}, want 'package.module:function'.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"reward: cannot import {module_name!r} of {reward!r}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(unknown("reward", name, [n for n in vars(module) if callable(getattr(module, n))]))
    return function  # type: ignore[no-any-return]
