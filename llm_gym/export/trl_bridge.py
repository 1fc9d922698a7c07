"""An environment with tools as TRL's trainer plays it: reset, calls one by one, and the last reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_gym.envs.tools.parsers.calls import ToolCall
from llm_gym.errors import FAULTS, ConfigError, boundary, described


class Bridge:
    """Base of the classes that `trl_environment` makes; to TRL every further public name would be a tool."""

    _make: Callable[[], Any]

    def __init__(self) -> None:
        self._env = self._make()
        self._begin()

    def reset(self, *, seed: int | None = None, **row: Any) -> str:
        """The first messages as one text, which TRL puts behind the last message of the row's prompt.

        Raises:
            ConfigError: the row has no seed.
        """
        if seed is None:
            raise ConfigError("train_dataset: want a column `seed`, so that the members of a group have the same task.")
        self._begin()
        try:
            _, info = self._env.reset(seed=seed)
        except FAULTS as error:
            self._over = self._failed = boundary(error, policy=False).failed
            return f"Error: {described(error)}"
        return "\n\n".join(str(message["content"]) for message in info["messages"])

    def get_reward(self) -> float | None:
        """What the calls have earned; None, which TRL passes over, if the episode failed.

        Raises:
            ConfigError: `trl_final` is not among the trainer's reward functions.
        """
        if self._final is None:
            raise ConfigError("reward_funcs: want trl_final, as TRL shows the last reply to reward functions alone.")
        return None if self._failed else self._earned

    def _begin(self) -> None:
        self._earned, self._failed, self._over = 0.0, False, False
        self._final: float | None = None

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The result of a call, as the model reads it."""
        reward, said = self._step(self._env.unwrapped.format.notation.write([ToolCall(name, dict(arguments))]))
        self._earned += reward
        return said

    def _end(self, completion: Sequence[Mapping[str, Any]]) -> float | None:
        """What the last reply has earned: nothing, if it is none to the user; None, if the episode failed."""
        last = completion[-1] if completion else {}
        answered = last.get("role") == "assistant" and not last.get("tool_calls")
        self._final = self._step(str(last.get("content") or ""))[0] if answered else 0.0
        return None if self._failed else self._final

    def _step(self, text: str) -> tuple[float, str]:
        """The reward of a reply, and what is said to it."""
        if self._over:
            return 0.0, "Error: the episode is over."
        try:
            _, reward, terminated, truncated, info = self._env.step(self._env.unwrapped.chat.encode_reply(text))
        except FAULTS as error:
            self._over = self._failed = boundary(error, policy=False).failed
            return 0.0, f"Error: {described(error)}"
        self._over = terminated or truncated
        self._failed = self._over and info["stop_reason"].failed
        return float(reward), str(info["messages"][-1].get("content") or "")
