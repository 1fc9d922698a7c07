"""OpenEnv's servers, made with its own package (https://github.com/huggingface/OpenEnv, version 0.10)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from llm_gym import envs

ACTION: dict[str, Any] = {
    "text": (str, ""),  # a reply
    "tokens": (list[int] | None, None),  # the same as it was sampled, stop token included; then it is not encoded again
}
SEEN: dict[str, Any] = {
    "messages": (list[dict[str, Any]], []),  # what is new in the chat, for the model to read
    "rewrite": (list[dict[str, Any]] | None, None),  # the whole chat from here on, where history is rewritten
    "tools": (list[dict[str, Any]], []),  # schemas of the tools; after a reset
    "prompt_ids": (list[int], []),  # the whole context, as ids of the environment's tokenizer
    "rewards": (dict[str, float], {}),  # named components, summed; at the end
    "truncated": (bool, False),  # whether the episode ended by a limit or a fault
    "stop_reason": (str | None, None),  # why it ended
    "error": (str | None, None),  # what was wrong with a reply that nothing could be made of
}
"""Fields of an action and of an observation, with their defaults. OpenEnv's clients drop metadata, so all is here."""


def openenv_app(env_id: str, /, *, max_sessions: int = 64, **env_args: Any) -> Any:
    """An ASGI application (FastAPI's) that OpenEnv's clients play, with the task of `seed` or the row `task` at reset.

    `uvicorn.run(openenv_app("GuessNumber-v0"), port=8000)` serves it. `llmgym serve-env` needs no package of theirs.

    Args:
        env_id: the environment.
        max_sessions: clients at once, each with an environment and a thread of its own.
        env_args: the environment's keyword arguments.

    Raises:
        SettingError: an unknown id, or wrong arguments.
    """
    from openenv.core.env_server.http_server import create_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State
    from pydantic import create_model

    make = partial(envs.make, env_id, **env_args)
    make().close()
    say, seen = create_model("Say", __base__=Action, **ACTION), create_model("Seen", __base__=Observation, **SEEN)
    shown = {"SUPPORTS_CONCURRENT_SESSIONS": True, "REQUIRES_SINGLE_THREAD_EXECUTOR": True}
    kind: Any = type("Served", (Served, Environment), shown)
    return create_app(partial(kind, make, seen, State), say, seen, env_name=env_id, max_concurrent_envs=max_sessions)


class Served:
    """An environment with the methods of OpenEnv's `Environment`, which is its other base."""

    state: Any = None

    def __init__(self, make: Callable[[], Any], seen: Callable[..., Any], state: Callable[..., Any]) -> None:
        super().__init__()
        self._env, self._seen, self._state = make(), seen, state
        self._known, self.state = 0, state()
        self._context = np.empty(0, np.int32)

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, task: int | None = None, **others: Any
    ) -> Any:
        """The first messages and context."""
        self.state = self._state(episode_id=episode_id)
        self._context, info = self._env.reset(seed=seed, options=None if task is None else {"task": task})
        self._known = len(info["messages"])
        return self._observed(messages=info["messages"], tools=info.get("tools", []))

    def step(self, action: Any, timeout_s: float | None = None, **others: Any) -> Any:
        """What follows a reply: its text, or the ids that were sampled."""
        chat, known = self._env.unwrapped.chat, self._known
        ids = chat.encode_reply(action.text, self._context) if action.tokens is None else action.tokens
        self._context, reward, terminated, truncated, info = self._env.step(np.array(ids, np.int32))
        self._known, self.state.step_count = len(info["messages"]), self.state.step_count + 1
        new = {"rewrite": info["messages"]} if info.get("rewritten") else {"messages": info["messages"][known + 1 :]}
        end = {name: info[name] for name in ("rewards", "stop_reason", "error") if name in info}
        return self._observed(reward=float(reward), done=terminated or truncated, truncated=truncated, **new, **end)

    def _observed(self, **fields: Any) -> Any:
        return self._seen(prompt_ids=self._context.tolist(), **fields)

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()
