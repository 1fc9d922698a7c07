"""Where episodes are played: environments kept for reuse; those that wait are awaited, or each has a thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium

from llm_gym import envs
from llm_gym.concurrency import Worker, cancelled
from llm_gym.envs.asynchronous import awaited, way_of
from llm_gym.errors import FAULTS, SettingError, described

Env = gymnasium.Env[Any, Any]
PATIENCE = 10.0
"""Seconds that `EnvPool.close` waits for environments that close in a thread."""
BRIEF = 1.0
"""Seconds that it waits where a call is still under way in an environment: most tools answer by then."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class EnvSlot:
    """An environment, and how its calls are made."""

    env: Env
    reset: Callable[..., Any]
    step: Callable[..., Any]
    inline: bool
    """Whether they never wait. If not, they run in a thread, or are awaited where there is none."""
    worker: Worker | None
    abandoned: bool = False
    """Whether a call was left unfinished."""

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `reset` or `step` returns; cancelling it leaves the call unfinished."""
        try:
            if self.inline:
                return function(*args, **kwargs)
            result = await (self.worker.run(function, *args, **kwargs) if self.worker else function(*args, **kwargs))
        except BaseException as error:
            self._look_for_a_cancellation(error)
            raise
        self._look_for_a_cancellation(None)
        return result

    def _look_for_a_cancellation(self, raised: BaseException | None) -> None:
        """Sees to it that a cancelled call ends as such, whatever a hook made of it; and that no other does."""
        by_driver = cancelled()
        self.abandoned = by_driver or isinstance(raised, asyncio.CancelledError)
        if by_driver:
            raise asyncio.CancelledError from raised
        if self.abandoned:
            raise RuntimeError("A hook was cancelled, and not by its driver.") from raised


class EnvPool:
    """Environments of one kind: made when nobody leaves one free, used again, closed together.

    Args:
        env: an id, short or full, or a callable that makes an environment.
        args: its keyword arguments.
        name: what episodes call it; None: its id.

    Raises:
        SettingError: an unknown id; from `take`, the first environment cannot be made.
    """

    def __init__(self, env: str | Callable[..., Env], args: Mapping[str, Any], name: str | None = None) -> None:
        if isinstance(env, gymnasium.Env):
            raise SettingError(
                f"env: got {env}, which is made already, but many are played in at once; pass its id, or a function "
                "that makes one."
            )
        self.env_id = envs.resolve(env) if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self._make, self._args, self._name = env, dict(args), name
        self.way: str | None = None
        """How calls are made (`asynchronous.way_of`); not known before the first environment was made."""
        self._free: list[EnvSlot] = []
        self._every: set[EnvSlot] = set()
        self._ending: list[tuple[Worker, float]] = []  # threads that close their environment, seconds to wait

    async def take(self) -> EnvSlot:
        """An environment nobody plays in; a new one if there is none."""
        if self._free:
            return self._free.pop()
        if self.way is None:
            env = self._first()
            self.way = way_of(env)
            slot = _slot(env, self.way, Worker() if self.way == "thread" else None)
        elif self.way == "thread":
            slot = await self._make_in_thread()
        else:
            slot = _slot(self._new(), self.way)
        self._every.add(slot)
        return slot

    def leave(self, slot: EnvSlot, *, broken: bool) -> None:
        """Frees an environment, or closes one that may be broken."""
        if broken or slot.abandoned:
            self._discard(slot)
        else:
            self._free.append(slot)

    def close(self) -> None:
        """Closes every environment, and waits for their threads."""
        for slot in list(self._every):
            self._discard(slot)
        self._free.clear()
        ending, self._ending = self._ending, []
        began = time.monotonic()
        left = [w for w, patience in ending if not w.join(max(0.0, began + patience - time.monotonic()))]
        if left:
            log.warning("%d environments of %s did not close and are left behind", len(left), self.env_id)

    async def _make_in_thread(self) -> EnvSlot:
        """A slot whose environment is made, used and closed in a thread of its own."""
        worker, made = Worker(), list[Env]()
        try:
            await worker.run(lambda: made.append(self._new()))
        except BaseException:  # if cancelled, the environment may yet appear
            self._end(worker, lambda: _close(*made), BRIEF)
            raise
        return _slot(made[0], "thread", worker)

    def _first(self) -> Env:
        """The first environment: if it cannot be made, none can."""
        try:
            env = self._new()
        except SettingError:
            raise
        except FAULTS as error:
            raise SettingError(f"env: cannot make {self.env_id!r} with {self._args}: {described(error)}") from error
        if env.spec is not None:
            self.env_id = env.spec.id
        self.env_id = self._name or self.env_id
        return env

    def _new(self) -> Env:
        return envs.make(self._make, **self._args) if isinstance(self._make, str) else self._make(**self._args)

    def _discard(self, slot: EnvSlot) -> None:
        self._every.discard(slot)
        if slot.worker is None:
            _close(slot.env)
            return
        self._end(slot.worker, lambda: _close(slot.env), BRIEF if slot.abandoned else PATIENCE)

    def _end(self, worker: Worker, last: Callable[[], None], patience: float) -> None:
        """Ends a thread, when the call under way in it has come back; `close` waits `patience` seconds for it."""
        worker.stop(last)
        self._ending = [*(each for each in self._ending if each[0].alive), (worker, patience)]


def _slot(env: Env, way: str, worker: Worker | None = None) -> EnvSlot:
    reset, step = awaited(env) if way == "awaited" else (env.reset, env.step)
    return EnvSlot(env, reset, step, way == "inline", worker)


def _close(*every: Env) -> None:
    """Closes environments; an error is only logged, for nothing depends on them any more."""
    for env in every:
        try:
            env.close()
        except FAULTS:
            log.warning("closing an environment failed", exc_info=True)
