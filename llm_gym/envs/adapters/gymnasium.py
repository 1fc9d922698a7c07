"""`Gymnasium-v0`: environments of Gymnasium and MiniGrid with discrete actions, told in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium import spaces

from llm_gym.core import Messages
from llm_gym.env import Reply
from llm_gym.envs.adapters.foreign import ForeignEnv
from llm_gym.envs.adapters.gymnasium_words import known, passenger, tellable, told, unpainted
from llm_gym.envs.adapters.packages import load
from llm_gym.errors import FAULTS, ConfigError, described, ended

MINIGRID = ("MiniGrid-", "BabyAI-")
UNREAD = -0.1
"""The component `format` of a reply that names no action."""


class GymnasiumWords(ForeignEnv):
    """An environment of Gymnasium, played by naming actions.

    Args:
        name: its id, such as `FrozenLake-v1` or `MiniGrid-Empty-5x5-v0`; `package.module:id` imports the module first.
        config: keyword arguments of the environment, as `{"is_slippery": false}`.
        actions: names of its actions, in order; None: its own, where they are known, or else their numbers.
        about: what the task is; None: a line of ours, where there is one.
        kwargs: the common arguments of `TextEnv`.

    A reply is the last action that it names or numbers; one that names none changes nothing but the component `format`.

    Reward components: `reward`, the environment's own, and `format`.

    Raises:
        ConfigError: it cannot be made, its actions are not discrete, or its observations too large for words.
    """

    reward_names = ("reward", "format")

    def __init__(
        self,
        *,
        name: str = "FrozenLake-v1",
        config: Mapping[str, Any] | None = None,
        actions: Sequence[str] | None = None,
        about: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.name = name
        with self.globals:
            self.inner = _made(name, dict(config or {}))
        space = self.inner.action_space
        if not isinstance(space, spaces.Discrete):
            raise ConfigError(f"name: {name!r} has actions {space}, want one of a list (Discrete).")
        if self.inner.render_mode is None and not tellable(self.inner.observation_space):
            raise ConfigError(f"name: {name!r} shows {self.inner.observation_space!s:.80}, which no words tell.")
        self.start, entry = int(space.start), known(name)
        self.names = _names(actions or entry.actions or _own_names(self.inner.unwrapped), int(space.n), self.start)
        self.about, self.features = entry.about if about is None else about, entry.features
        words = [*self.names, *(str(self.start + index) for index in range(len(self.names)))]
        one = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        self._said = re.compile(rf"(?<![\w.-])(?:{one})(?![\w-]|\.\d)", re.IGNORECASE)
        self.example_replies = tuple(self.names)

    def open(self) -> Messages:
        """The task, its actions, and what is seen first."""
        seed = self.draw_seed()
        with self.globals:
            seen = self._seen(self.inner.reset(seed=seed)[0])
        ask = f"Reply with one action: {', '.join(self.names)}."
        return [{"role": "user", "content": "\n".join(filter(None, (self.about, ask, seen)))}]

    def reply(self, text: str) -> Reply:
        """Takes the action that was named."""
        said = self._said.findall(text)
        if not said:
            return self._say(f"Reply with one action: {', '.join(self.names)}.", {"reward": 0.0, "format": UNREAD})
        word = said[-1].lower()
        action = self.names.index(word) if word in self.names else int(word) - self.start
        with self.globals:
            observation, reward, terminated, truncated, _ = self.inner.step(self.start + action)
            seen = self._seen(observation)
        return self._say(seen, {"reward": float(reward), "format": 0.0}, done=bool(terminated or truncated))

    def close(self) -> None:
        """Closes the environment inside too."""
        self.inner.close()
        super().close()

    def _seen(self, observation: Any) -> str:
        """What is told of a state."""
        if self.inner.render_mode != "ansi":
            return told(observation, self.features)
        drawn = unpainted(str(self.inner.render()))
        inner = self.inner.unwrapped
        return f"{drawn}\n{passenger(inner, observation)}" if self.name.startswith("Taxi-") else drawn

    def _say(self, words: str, reward: dict[str, float], *, done: bool = False) -> Reply:
        return Reply(messages=[{"role": "user", "content": words}], reward=reward, done=done)


def _made(name: str, config: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """The environment, drawing itself as text where it can.

    Raises:
        ConfigError: it cannot be made.
    """
    if name.startswith(MINIGRID):
        load("Gymnasium-v0")
    try:
        env = gymnasium.make(name, disable_env_checker=True, **config)
        if "ansi" in env.metadata.get("render_modes", ()) and env.render_mode is None:
            env.close()
            env = gymnasium.make(name, disable_env_checker=True, render_mode="ansi", **config)
    except FAULTS as error:
        raise ConfigError(f"name: cannot make {name!r}: {ended(described(error))}") from error
    return env


def _own_names(env: Any) -> Sequence[str]:
    """What an environment calls its actions: MiniGrid has an enumeration."""
    return [action.name for action in getattr(env, "actions", ())]


def _names(given: Sequence[str], count: int, start: int) -> list[str]:
    """A name for each action, in lower case; numbers if the given ones are not as many."""
    return [name.lower() for name in given] if len(given) == count else [str(start + index) for index in range(count)]
