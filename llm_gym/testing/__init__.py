"""The conformance suite: `check_environment` runs any environment, ours or yours, against the contract.

    >>> check_environment("llm_gym/GuessNumber-v0", high=60)

It plays short scripted episodes and raises an `AssertionError` that names the check and what was
found. It needs no model and takes well under a second for a cheap environment.
"""

from __future__ import annotations

import asyncio
import copy
import math
import multiprocessing
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.seeding import np_random

from llm_gym.concurrency import run_here
from llm_gym.core import Ids, StopReason
from llm_gym.envs import make, resolve
from llm_gym.envs.asynchronous import lacking
from llm_gym.spaces import Tokens
from llm_gym.testing.episodes import WORDS as WORDS
from llm_gym.testing.episodes import Step, difference, play, play_async
from llm_gym.testing.episodes import scripted_action as scripted_action

Env = gymnasium.Env[Any, Any]
SEEDS = tuple(range(16))
GRACE_SECONDS = 5.0
"""How long what `close` stops may take to disappear."""


def check_environment(env: str | Env | Callable[..., Env], /, **kwargs: Any) -> None:
    """Checks an environment against the contract of this package.

    Args:
        env: a registered id (full or short), a class or function that makes an environment, or an instance.
        kwargs: arguments of the environment, for an id, class or function; of any name.

    Raises:
        AssertionError: it breaks the contract; the text says which check, and what was found or raised.
        SettingError: an unknown id.
    """
    subject = _Subject(*_maker(env, kwargs))
    for check in CHECKS:
        try:
            check(subject)
        except Exception as error:
            label = check.__name__.removeprefix("check_").replace("_", " ")
            said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{subject.name}: {label}: {said}") from error


@dataclass(frozen=True)
class _Subject:
    """What is being checked."""

    name: str
    make: Callable[[], Env]

    def played(self, seed: int = 0) -> list[Step]:
        """One whole episode of a new environment."""
        with closing(self.make()) as env:
            return play(env, seed)


def check_gymnasium(subject: _Subject) -> None:
    """Gymnasium's own `check_env`, its warnings taken as failures."""
    with warnings.catch_warnings(), closing(subject.make()) as env:
        warnings.filterwarnings("error", message=".*WARN:")
        warnings.filterwarnings("ignore", message=".*Not able to test alternative render modes.*")
        check_env(env.unwrapped)


def check_spaces(subject: _Subject) -> None:
    """Both spaces are `Tokens`; every observation and scripted action is a member, contexts are int32."""
    with closing(subject.make()) as env:
        for name in ("observation_space", "action_space"):
            _require(isinstance(getattr(env, name), Tokens), f"{name} is {getattr(env, name)}, want Tokens.")
        for seed in SEEDS:
            for i, step in enumerate(play(env, seed)):
                _require(getattr(step.obs, "dtype", None) == np.int32, f"step {i}: the observation is not int32.")
                _require(step.obs in env.observation_space, f"step {i}, seed {seed}: observation not in the space.")


def check_append_only(subject: _Subject) -> None:
    """Each context begins with the last one and the action, unless `info["rewritten"]` is True."""
    for seed in SEEDS:
        steps = subject.played(seed)
        for i, (last, step) in enumerate(pairwise(steps), 1):
            assert step.action is not None
            known = np.concatenate([last.obs, step.action])
            rewritten = step.info.get("rewritten", False)
            _require(isinstance(rewritten, bool), f"step {i}: info['rewritten'] is {rewritten!r}, want a bool.")
            extends = rewritten or np.array_equal(step.obs[: len(known)], known)
            what = "the observation does not begin with the last one and the action."
            _require(extends, f"step {i}, seed {seed}: {what}")
            if step.terminated or step.truncated:
                _require(len(step.obs) == len(known), f"step {i}: the last observation is not context + action.")


def check_info(subject: _Subject) -> None:
    """Rewards are finite numbers; infos hold the chat, and on the last step why it ended and for what."""
    with closing(subject.make()) as env:
        weights = getattr(env.unwrapped, "reward_weights", {})
        episodes = {seed: play(env, seed) for seed in SEEDS}
    for seed, steps in episodes.items():
        for i, step in enumerate(steps):
            _check_step(step, f"step {i}, seed {seed}")
        last = steps[-1]
        total = sum(weights.get(name, 1.0) * value for name, value in last.info["rewards"].items())
        returned = sum(step.reward for step in steps)
        what = f"the weighted components of info['rewards'] sum to {total}, the step rewards to {returned}."
        _require(math.isclose(total, returned, rel_tol=1e-6, abs_tol=1e-6), f"seed {seed}: {what}")
        if not any(step.info.get("rewritten") for step in steps):
            asked, said = (sum(m["role"] == "assistant" for m in s.info["messages"]) for s in (steps[0], last))
            new, turns = said - asked, len(steps) - 1
            _require(new == turns, f"seed {seed}: info['messages'] holds {new} replies after {turns} steps.")


def check_determinism(subject: _Subject) -> None:
    """A seed and a script give the same episode: again, after other seeds, and in another instance."""
    with closing(subject.make()) as env:
        for seed in SEEDS[:4]:
            first = play(env, seed)
            play(env, seed + 1)
            _same(first, play(env, seed), f"seed {seed}, played again in the same environment")
            _same(first, subject.played(seed), f"seed {seed}, in another instance")


def check_seeds(subject: _Subject) -> None:
    """Seeds matter: episodes of many seeds differ, or were drawn alike by chance.

    An environment that begins in one way and draws nothing says so by `metadata["fixed_start"]`.
    """
    with closing(subject.make()) as env:
        if env.metadata.get("fixed_start") or getattr(env.unwrapped, "num_tasks", None) == 1:
            return
        script = play(env, SEEDS[0])
        for seed in SEEDS[1:]:
            steps = [Step(None, *_reset(env, seed))]
            for step in script[1:]:
                if steps[-1].terminated or steps[-1].truncated:
                    break
                steps.append(Step(step.action, *env.step(step.action)))
            if difference(script, steps) is not None:
                return
        left, fresh = env.unwrapped.np_random, np_random(SEEDS[-1])[0]
    drew = not data_equivalence(left.bit_generator.state, fresh.bit_generator.state)  # and all alike by chance
    what = f"seeds {SEEDS[0]} to {SEEDS[-1]} all give the same episode, and nothing was drawn from self.np_random"
    _require(drew, f'{what}; is the seed ignored? If nothing is random, declare it: metadata["fixed_start"] = True.')


def check_task_option(subject: _Subject) -> None:
    """`reset(options={"task": 0})` is accepted, and with a seed it fixes the episode's start."""
    with closing(subject.make()) as env:
        first = env.reset(seed=3, options={"task": 0})
        env.reset(seed=5)
        second = env.reset(seed=3, options={"task": 0})
        other, _ = env.reset(seed=4, options={"task": 0})
    _require(data_equivalence(first, second, exact=True), "two resets to task 0 with seed 3 differ.")
    if getattr(env.unwrapped, "num_tasks", None) is not None:
        _require(np.array_equal(first[0], other), "resets to task 0 with seeds 3 and 4 show different rows.")


def check_fresh_data(subject: _Subject) -> None:
    """What is returned belongs to the caller: overwriting it changes nothing later."""
    clean = subject.played(1)
    with closing(subject.make()) as env:
        _same(clean, play(env, 1, spoil=True), "seed 1, with every returned observation and info overwritten")


def check_independence(subject: _Subject) -> None:
    """Two instances stepped in turn play the same episodes as each alone."""
    alone = {seed: subject.played(seed) for seed in (2, 3)}
    envs = {seed: subject.make() for seed in alone}
    together = {seed: [Step(None, *_reset(env, seed))] for seed, env in envs.items()}
    for turn in range(1, max(len(steps) for steps in alone.values())):
        for seed, env in envs.items():
            if turn < len(alone[seed]):
                together[seed].append(Step(alone[seed][turn].action, *env.step(alone[seed][turn].action)))
    for seed in alone:
        _same(alone[seed], together[seed], f"seed {seed}, with another instance beside it")
        envs[seed].close()


def check_order(subject: _Subject) -> None:
    """`step` before `reset` and after the end raises `ResetNeeded`; `reset` starts anew at any time."""
    env = subject.make().unwrapped
    action = scripted_action(env, 0, 1)
    _require(_refuses(env, action), "step() before reset() did not raise ResetNeeded.")
    whole = play(env, 0)
    _require(_refuses(env, action), "step() after the end did not raise ResetNeeded.")
    env.reset(seed=9)
    _same(whole, play(env, 0), "seed 0, after a reset in the middle of an episode")
    env.close()


def check_awaited(subject: _Subject) -> None:
    """`reset_async` and `step_async`, where they are, play the same episodes, several at once in one event loop."""
    with closing(subject.make()) as env:
        if lacking(env):
            return

    async def every() -> list[list[Step]]:
        return await asyncio.gather(*(play_async(env, seed) for seed, env in envs.items()))

    with ExitStack() as stack:
        envs = {seed: stack.enter_context(closing(subject.make())) for seed in SEEDS[:4]}
        together = run_here(every())
    for seed, steps in zip(envs, together, strict=True):
        _same(subject.played(seed), steps, f"seed {seed}, awaited")


def check_length_limit(subject: _Subject) -> None:
    """A completion of `max_tokens` tokens without a stop token is graded, and ends the episode as cut."""
    with closing(subject.make()) as env:
        limit, chat = (getattr(env.unwrapped, name, None) for name in ("max_tokens", "chat"))
        if limit is None or chat is None:
            return
        filler = next(i for i in range(chat.vocab_size) if i not in chat.stop_ids)
        env.reset(seed=0)
        *_, terminated, truncated, info = env.step(np.full(limit, filler, np.int32))
        ended = (bool(terminated), bool(truncated), info.get("stop_reason"))
    want = (False, True, StopReason.TOKEN_LIMIT)
    _require(ended == want, f"a cut completion gives {ended}, want {want}.")


def check_spec(subject: _Subject) -> None:
    """A registered environment's spec survives pickling and makes the same environment."""
    with closing(subject.make()) as env:
        if env.spec is None:
            return
        with closing(pickle.loads(pickle.dumps(env.spec)).make()) as twin:
            same = data_equivalence(env.reset(seed=4), twin.reset(seed=4), exact=True)
    _require(same, "the environment made from the pickled spec starts differently.")


def check_close(subject: _Subject) -> None:
    """`close` may be called twice, at any time, and leaves no thread, process or socket behind."""
    subject.make().close()  # what the process loads once is no leak
    before = _held()
    env = subject.make()
    play(env, 0)
    env.reset(seed=1)
    env.close()
    env.close()
    patience = time.monotonic() + GRACE_SECONDS
    while (left := _held() - before) and time.monotonic() < patience:
        time.sleep(0.01)
    _require(not left, f"left behind: {', '.join(sorted(left))}.")


CHECKS: tuple[Callable[[_Subject], None], ...] = (
    check_gymnasium, check_spaces, check_append_only, check_info, check_determinism, check_seeds, check_task_option,
    check_fresh_data, check_independence, check_awaited, check_order, check_length_limit, check_spec, check_close,
)  # fmt: skip


def _maker(env: str | Env | Callable[..., Env], kwargs: Mapping[str, Any]) -> tuple[str, Callable[[], Env]]:
    """A name and a function that makes a new instance."""
    if isinstance(env, str):
        full = resolve(env)
        return full, lambda: make(full, **kwargs)
    if isinstance(env, gymnasium.Env):
        _require(not kwargs, f"{env}: keyword arguments are for an id or a class, not for an instance.")
        spec = env.spec
        name = spec.id if spec is not None else type(env.unwrapped).__name__
        return name, (lambda: copy.deepcopy(env)) if spec is None else spec.make
    return getattr(env, "__name__", repr(env)), lambda: env(**kwargs)


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise AssertionError(what)


def _reset(env: Env, seed: int) -> tuple[Ids, Any, bool, bool, dict[str, Any]]:
    """A reset in the form of a step."""
    obs, info = env.reset(seed=seed)
    return obs, 0.0, False, False, info


def _refuses(env: Env, action: Ids) -> bool:
    try:
        env.step(action)
    except ResetNeeded:
        return True
    return False


def _check_step(step: Step, where: str) -> None:
    """The types and the info of one step."""
    _require(
        isinstance(step.reward, float | int | np.floating) and math.isfinite(step.reward),
        f"{where}: the reward is {step.reward!r}, want a finite float.",
    )
    for name in ("terminated", "truncated"):
        _require(isinstance(getattr(step, name), bool), f"{where}: {name} is {getattr(step, name)!r}, want a bool.")
    messages = step.info.get("messages")
    _require(
        isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages),
        f"{where}: info['messages'] is {messages!r:.80}, want a list of chat messages.",
    )
    reason = step.info.get("stop_reason")
    if not (step.terminated or step.truncated):
        _require(reason is None, f"{where}: info['stop_reason'] is {reason!r} before the end.")
        return
    if not isinstance(reason, StopReason):
        raise AssertionError(f"{where}: info['stop_reason'] is {reason!r}, want a StopReason.")
    ends = (reason.terminated, not reason.terminated)
    _require(
        (step.terminated, step.truncated) == ends,
        f"{where}: {reason} wants (terminated, truncated) = {ends}, got {(step.terminated, step.truncated)}.",
    )
    rewards = step.info.get("rewards")
    _require(
        isinstance(rewards, dict) and all(math.isfinite(value) for value in rewards.values()),
        f"{where}: info['rewards'] is {rewards!r}, want finite numbers by name.",
    )


def _same(one: list[Step], two: list[Step], what: str) -> None:
    where = difference(one, two)
    _require(where is None, f"{what}, the episode differs: {where}.")


def _held() -> set[str]:
    """Threads, child processes and sockets of this process, by name."""
    held = {f"thread {thread.name!r} ({thread.ident})" for thread in threading.enumerate()}
    held |= {f"process {child.pid}" for child in multiprocessing.active_children()}
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # of a thread that has ended by now
            held |= {f"process {pid}" for pid in children.read_text().split()}
    for file in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # the folder's own descriptor, closed by now
            target = os.readlink(file)
            if target.startswith("socket:"):
                held.add(target)
    return held
