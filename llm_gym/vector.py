"""The vector environment: lockstep `step` for Gymnasium, `send`/`recv` where no one waits for another.

`gymnasium.make_vec("llm_gym/GSM8K-v0", num_envs=64)` gives one, and so it does for an environment of your own that
`llm_gym.register` has registered. Results equal those of `SyncVectorEnv` step for step, in every autoreset mode.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from llm_gym.concurrency import Loop, Outcome, settled
from llm_gym.core import Ids
from llm_gym.envs import make
from llm_gym.envs.asynchronous import reset_async, step_async, way_of
from llm_gym.errors import ConfigError, unknown

MAX_THREADS = 64
Step = tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]
"""What `step` returns."""


@dataclass(frozen=True, slots=True)
class Result:
    """One environment's step, as `recv` returns it."""

    index: int
    """Which environment."""
    obs: Ids
    """Its context, int32 [t]."""
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    """Its info; in the mode SAME_STEP also `final_obs` and `final_info` of an episode that ended."""


class TextVectorEnv(VectorEnv[tuple[Ids, ...], Sequence[Ids], npt.NDArray[Any]]):
    """Several copies of one environment.

    Observations are a tuple of int32 arrays of different lengths. Environments that declare `metadata["blocking"]` step
    in threads, those that are awaited (`TextEnv.asynchronous`) in one event loop, the others in the caller's thread.

    Args:
        env: a registered id or a function that makes one environment.
        num_envs: how many.
        autoreset_mode: when an environment that ended is reset: at its next step (the default of
            Gymnasium; that step's action is ignored), at once, or only by `reset`.
        kwargs: arguments of the environment.

    Raises:
        ConfigError: `num_envs` below 1, or an unknown mode.
    """

    def __init__(
        self,
        env: str | Callable[..., gymnasium.Env[Any, Any]],
        /,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **kwargs: Any,
    ) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs: got {num_envs!r}, want at least 1.")
        self.num_envs = num_envs
        self.autoreset_mode = _mode(autoreset_mode)
        self.envs = [make(env, **kwargs) if isinstance(env, str) else env(**kwargs) for _ in range(num_envs)]
        first = self.envs[0]
        self.metadata = {**first.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = first.render_mode
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.observation_space = batch_space(first.observation_space, num_envs)
        self.action_space = batch_space(first.action_space, num_envs)
        self._obs: list[Any] = [None] * num_envs
        self._ended = np.zeros(num_envs, np.bool_)
        self._pending: set[int] = set()
        self._done: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()
        way = way_of(first)
        self._pool = ThreadPoolExecutor(min(num_envs, MAX_THREADS), "llm_gym-env") if way == "thread" else None
        self._loop = Loop("llm_gym-envs") if way == "awaited" else None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Ids, ...], dict[str, Any]]:
        """Resets all environments, or those that `options={"reset_mask": bool [num_envs]}` marks.

        Args:
            seed: one seed s (environment i gets s + i), or one for each environment.
            options: passed on to every environment, `reset_mask` apart.

        Raises:
            ValueError: seeds or a mask of the wrong length.
        """
        self._refuse_if_pending("reset()")
        seeds = self._seeds(seed)
        options = dict(options or {})
        chosen = _masked(options.pop("reset_mask", None), self.num_envs)

        def one(i: int) -> Any:
            call = self.envs[i].reset if self._loop is None else partial(reset_async, self.envs[i])
            return call(seed=seeds[i], options=options or None)

        infos: dict[str, Any] = {}
        for i, (obs, info) in zip(chosen, self._map(one, chosen), strict=True):
            self._obs[i], self._ended[i] = obs, False
            infos = self._add_info(infos, info, i)
        return self._observations(), infos

    def step(
        self, actions: Iterable[Any]
    ) -> tuple[tuple[Ids, ...], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Steps every environment once.

        Args:
            actions: one completion, int32 [n], for each environment.

        Returns:
            Contexts, float64 rewards, bool terminated, bool truncated ([num_envs] each) and infos.
        """
        self._refuse_if_pending("step()")
        every = list(actions)
        if len(every) != self.num_envs:
            raise ValueError(f"actions: got {len(every)}, want one for each of {self.num_envs} environments.")
        advance = self._advance if self._loop is None else self._advance_async
        results = self._map(lambda i: advance(i, every[i]), range(self.num_envs))
        infos: dict[str, Any] = {}
        for result in results:
            infos = self._add_info(infos, result.info, result.index)
        rewards = np.array([r.reward for r in results], np.float64)
        terminated = np.array([r.terminated for r in results], np.bool_)
        truncated = np.array([r.truncated for r in results], np.bool_)
        return self._observations(), rewards, terminated, truncated, infos

    def send(self, actions: Iterable[Any], indices: Iterable[int]) -> None:
        """Starts a step of some environments; `recv` hands out the results as they finish.

        Raises:
            ValueError: an index out of range or with a step still under way, or unequal lengths.
        """
        for index, action in zip(indices, actions, strict=True):
            if not 0 <= index < self.num_envs:
                raise ValueError(f"indices: got {index}, want 0 to {self.num_envs - 1}.")
            if index in self._pending:
                raise ValueError(f"indices: environment {index} has a step under way; recv() it first.")
            self._pending.add(index)
            if self._loop is not None:
                self._loop.submit(self._work_async(index, action))
            elif self._pool is not None:
                self._pool.submit(self._work, index, action)
            else:
                self._work(index, action)

    def recv(self, timeout: float | None = None) -> list[Result]:
        """Finished steps: waits for one, and adds every other that is ready.

        Args:
            timeout: seconds to wait for the first; None waits as long as it takes.

        Raises:
            ValueError: no step is under way.
            TimeoutError: none finished in time.
            Exception: whatever an environment raised; its step is over, the others are untouched.
        """
        if not self._pending:
            raise ValueError("recv() was called with no step under way; send() one first.")
        try:
            finished = [self._done.get(timeout=timeout)]
        except queue.Empty:
            raise TimeoutError(f"No environment finished a step within {timeout} seconds.") from None
        while not self._done.empty() and not isinstance(finished[-1][1], BaseException):
            finished.append(self._done.get())
        *before, (index, last) = finished
        if isinstance(last, BaseException) and before:  # hand out what is good; raise at the next call
            self._done.put((index, last))
            finished = before
        self._pending.difference_update(i for i, _ in finished)
        if isinstance(finished[0][1], BaseException):
            raise finished[0][1]
        return [result for _, result in finished if isinstance(result, Result)]

    def render(self) -> tuple[Any, ...]:
        """What each environment renders."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Waits for steps under way, or cancels those that are awaited, then closes every environment."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._loop is not None:
            self._loop.stop()
        for env in self.envs:
            env.close()

    def _advance(self, index: int, action: Any) -> Result:
        """One step of one environment, the autoreset included."""
        env = self.envs[index]
        if self._is_over(index):
            return self._restarted(index, *env.reset())
        step = env.step(action)
        return self._stepped(index, step, env.reset() if self._is_reset_after(step) else None)

    async def _advance_async(self, index: int, action: Any) -> Result:
        """The same, awaited."""
        env = self.envs[index]
        if self._is_over(index):
            return self._restarted(index, *await reset_async(env))
        step = await step_async(env, action)
        return self._stepped(index, step, await reset_async(env) if self._is_reset_after(step) else None)

    def _is_over(self, index: int) -> bool:
        """Whether an environment's episode has ended, so that a step resets it."""
        if self._ended[index] and self.autoreset_mode is AutoresetMode.DISABLED:
            raise gymnasium.error.ResetNeeded(f"Environment {index} ended; reset it with options['reset_mask'].")
        return bool(self._ended[index])

    def _is_reset_after(self, step: Step) -> bool:
        """Whether the same step also begins the next episode."""
        return (step[2] or step[3]) and self.autoreset_mode is AutoresetMode.SAME_STEP

    def _restarted(self, index: int, obs: Ids, info: dict[str, Any]) -> Result:
        self._obs[index], self._ended[index] = obs, False
        return Result(index, obs, 0.0, False, False, info)

    def _stepped(self, index: int, step: Step, fresh: tuple[Ids, dict[str, Any]] | None) -> Result:
        """The result of a step, and of the reset that came with it."""
        obs, reward, terminated, truncated, info = step
        if fresh is not None:
            final = {"final_obs": obs, "final_info": info}
            obs, info = fresh[0], {**fresh[1], **final}
        else:
            self._ended[index] = terminated or truncated
        self._obs[index] = obs
        return Result(index, obs, float(reward), terminated, truncated, info)

    def _work(self, index: int, action: Any) -> None:
        """`_advance`, with the outcome put into the queue."""
        try:
            self._done.put((index, self._advance(index, action)))
        except BaseException as error:  # in a thread of the pool nobody else would hear of it
            self._done.put((index, error))

    async def _work_async(self, index: int, action: Any) -> None:
        """The same, awaited."""
        outcome = await settled(self._advance_async(index, action))
        self._done.put((index, outcome.error or outcome.get()))

    def _map(self, function: Callable[[int], Any], indices: Iterable[int]) -> list[Any]:
        """`function` of each index, awaited all together or in threads if the environments wait."""
        if self._loop is None:
            return list(self._pool.map(function, indices) if self._pool is not None else map(function, indices))
        return [outcome.get() for outcome in self._loop.run(_all(map(function, indices)))]

    def _observations(self) -> tuple[Ids, ...]:
        """The contexts, as copies that the caller may keep and change."""
        if any(obs is None for obs in self._obs):
            raise gymnasium.error.ResetNeeded("Some environments were never reset; call reset() without a mask first.")
        return tuple(obs.copy() for obs in self._obs)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        """A seed for each environment."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: got {len(seed)} seeds, want one for each of {self.num_envs} environments.")
        return list(seed)

    def _refuse_if_pending(self, what: str) -> None:
        if self._pending:
            raise ValueError(f"{what} was called with steps under way in {sorted(self._pending)}; recv() them first.")


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Outcome[Any]]:
    """What every call comes to; nobody waits for anybody."""
    return await asyncio.gather(*map(settled, calls))


def _mode(mode: str | AutoresetMode) -> AutoresetMode:
    """An autoreset mode from its enum or its value."""
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise ConfigError(unknown("autoreset_mode", mode, [m.value for m in AutoresetMode])) from None


def _masked(mask: Any, size: int) -> list[int]:
    """Indices that a reset mask marks; all of them without a mask."""
    if mask is None:
        return list(range(size))
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (size,) or not mask.any():
        raise ValueError(f"options['reset_mask']: got {mask!r}, want a bool array of shape ({size},) with one True.")
    return [int(i) for i in np.flatnonzero(mask)]


def __getattr__(name: str) -> Any:
    """The vector entry point of a registered id: `llm_gym.vector:llm_gym/GSM8K-v0`."""
    if name in gymnasium.registry:
        return partial(TextVectorEnv, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
