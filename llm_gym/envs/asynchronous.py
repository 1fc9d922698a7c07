"""Environments that are awaited: `reset_async` and `step_async`, through whatever wrappers are around them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Literal

import gymnasium
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from llm_gym.concurrency import is_async
from llm_gym.env import TextEnv
from llm_gym.errors import SettingError

Env = gymnasium.Env[Any, Any]
Call = Callable[..., Awaitable[Any]]
PASSING = (OrderEnforcing, PassiveEnvChecker)
"""Wrappers of Gymnasium that look at a call and pass it on; an awaited one goes around them."""

log = logging.getLogger(__name__)


async def reset_async(env: Env, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
    """`env.reset` for wrappers and loops that await; of an environment with `async def` hooks, nobody else waits.

    Raises:
        SettingError: a wrapper or the environment has none.
    """
    return await awaited(env)[0](seed=seed, options=options)


async def step_async(env: Env, action: Any) -> Any:
    """`env.step` for wrappers and loops that await.

    >>> import asyncio, llm_gym
    >>> class Halved(gymnasium.RewardWrapper):
    ...     def reward(self, reward):
    ...         return reward / 2
    ...
    ...     async def step_async(self, action):
    ...         observation, reward, *rest = await step_async(self.env, action)
    ...         return observation, self.reward(reward), *rest
    >>> env = Halved(gymnasium.make("llm_gym/Arithmetic-v0"))
    >>> _ = env.reset(seed=1)
    >>> asyncio.run(step_async(env, env.unwrapped.chat.encode_reply("No idea.")))[1]
    0.0

    Raises:
        SettingError: a wrapper or the environment has none.
    """
    return await awaited(env)[1](action)


def awaited(env: Env) -> tuple[Call, Call]:
    """The functions behind `reset_async` and `step_async`: of the outermost wrapper that has a say.

    Raises:
        SettingError: a wrapper or the environment has none.
    """
    if why := lacking(env):
        raise SettingError(f"env: {_name(env)} cannot be awaited, because {why}.")
    inner: list[Any] = [_through(env, name) for name in ("reset", "step")]
    return inner[0].reset_async, inner[1].step_async


def way_of(env: Env) -> Literal["inline", "thread", "awaited"]:
    """How the calls of an environment are made so that none holds up others; says once what forces threads.

    `inline`: it never waits. `awaited`: it waits in hooks that are `async def`. `thread`: it waits in others, or a
    wrapper cannot be awaited.
    """
    blocking = bool(env.metadata.get("blocking", False))
    inner = env.unwrapped
    if not getattr(inner, "asynchronous", hasattr(inner, "step_async")):
        return "thread" if blocking else "inline"
    reason = 'metadata["blocking"] is set' if blocking else lacking(env)
    plain = ", ".join(getattr(inner, "plain", ()))
    if reason or plain:
        _say(f"{_name(env)}: every episode keeps a thread, because {reason or f'{plain} is no `async def`'}.")
    return "thread" if reason else "awaited"


def lacking(env: Env) -> str:
    """Why an environment cannot be awaited, as the end of a sentence; empty if it can."""
    for name in ("reset", "step"):
        each = _through(env, name)
        while not (lacks := not _defines(type(each), name)) and isinstance(each, gymnasium.Wrapper):
            each = _through(each.env, name)
        if lacks:
            return f"{type(each).__name__} has {name}() without {name}_async()"
    kind = type(env.unwrapped)
    if issubclass(kind, TextEnv) and kind.reply_async is TextEnv.reply_async and not is_async(kind.reply):
        others = [base for base in kind.__mro__ if vars(base).get("reply_async", kind.reply_async) != kind.reply_async]
        if others:
            return f"{kind.__name__} has reply() without reply_async()"
    return ""


def _through(env: Env, name: str) -> Env:
    """`env`, or what is inside the wrappers that only pass `name` on."""
    while isinstance(env, gymnasium.Wrapper):
        passed_on = getattr(type(env), name) is getattr(gymnasium.Wrapper, name)
        if not (isinstance(env, PASSING) or (passed_on and not hasattr(type(env), f"{name}_async"))):
            break
        env = env.env
    return env


def _defines(cls: type, name: str) -> bool:
    """Whether the class that has the last word on `name` also says how it is awaited."""
    last = next(base for base in cls.__mro__ if name in vars(base) or f"{name}_async" in vars(base))
    return f"{name}_async" in vars(last)


def _name(env: Env) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


@lru_cache(maxsize=64)
def _say(text: str) -> None:
    log.warning(text)
