"""Scripted episodes: what the conformance suite plays, and where two of them differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import data_equivalence

from llm_gym.concurrency import at_once, wait
from llm_gym.core import Ids
from llm_gym.envs.asynchronous import awaited

Env = gymnasium.Env[Any, Any]
STEP_LIMIT = 500
"""An episode must end within so many steps."""
WORDS = ("42", "Answer: 7", "no idea", "I think it is 50.", "#### 12", "\\boxed{3}", "", "50", "25", "75")


class Step(NamedTuple):
    """One call of `reset` (no action) or `step`, as a copy of what it returned."""

    action: Ids | None
    obs: Ids
    reward: Any
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def play(env: Env, seed: int, *, spoil: bool = False) -> list[Step]:
    """One scripted episode: the reset and every step until the end.

    The seed is that of the reset and, with the turn, of the script. `spoil` overwrites every observation and info after
    recording it, as a careless caller would.
    """
    return at_once(_play(env, env.reset, env.step, seed, spoil))


async def play_async(env: Env, seed: int) -> list[Step]:
    """The same by `reset_async` and `step_async`."""
    return await _play(env, *awaited(env), seed, False)


async def _play(env: Env, reset: Callable[..., Any], step: Callable[..., Any], seed: int, spoil: bool) -> list[Step]:
    obs, info = await wait(reset(seed=seed))
    steps = [copy.deepcopy(Step(None, obs, 0.0, False, False, info))]
    while not (steps[-1].terminated or steps[-1].truncated):
        if len(steps) > STEP_LIMIT:
            raise AssertionError(f"an episode of seed {seed} did not end within {STEP_LIMIT} steps.")
        if spoil:
            _spoil(obs, info)
        action = scripted_action(env, seed, len(steps))
        obs, reward, terminated, truncated, info = await wait(step(action.copy()))
        steps.append(copy.deepcopy(Step(action, obs, reward, terminated, truncated, info)))
    return steps


def scripted_action(env: Env, seed: int, turn: int) -> Ids:
    """The script's completion: one of a few sentences (or an environment's own `example_replies`), now and then
    random tokens; a function of its arguments."""
    rng = np.random.default_rng([seed, turn])
    chat = getattr(env.unwrapped, "chat", None)
    if chat is None or rng.random() < 0.25:
        env.action_space.seed(int(rng.integers(2**31)))
        return np.asarray(env.action_space.sample())
    examples = getattr(env.unwrapped, "example_replies", ())
    words = examples if examples and rng.random() < 0.5 else WORDS
    reply: Ids = chat.encode_reply(words[rng.integers(len(words))])
    return reply[-getattr(env.unwrapped, "max_tokens", len(reply)) :]


def difference(one: list[Step], two: list[Step]) -> str | None:
    """Where two episodes first differ."""
    for i, (a, b) in enumerate(zip(one, two, strict=False)):
        for name, left, right in zip(Step._fields, a, b, strict=True):
            if not data_equivalence(left, right, exact=True):
                return f"step {i}, {name}: {left!r:.120} and {right!r:.120}"
    return None if len(one) == len(two) else f"{len(one) - 1} and {len(two) - 1} steps"


def _spoil(obs: Ids, info: dict[str, Any]) -> None:
    """Overwrites everything a caller could reach."""
    obs[:] = 0
    for message in info.get("messages", ()):
        message.clear()
    for value in info.values():
        if isinstance(value, list | dict):
            value.clear()
    info.clear()
