"""Actors that do the same work, as one client sees them: who takes a request, and what becomes of it when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from llm_gym.concurrency import Loop
from llm_gym.errors import LLMGymError, PolicyError, SettingError, described
from llm_gym.policies.vllm_server.routing import Prefixes, choose

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""What a call ends with whose actor has died."""
RESTARTS = 30
"""Times that Ray starts an actor again; one that dies as often has a reason to (a machine that is short of memory)."""
PLACING = 300.0
"""Seconds that Ray has to find places for actors and to start them."""


class Place:
    """An actor, as one client of it sees it."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.load, self.prefixes = actor, 0, Prefixes()
        self.back: asyncio.Task[None] | None = None
        """Waits for it to be there again; None while it is there."""
        self.reason = ""


class Places:
    """Actors of one kind. A request whose actor dies is repeated whole by another, or by the same when it is back.

    Args:
        what: what they are, in the singular.
        actors: their handles; each has a method `ready(least)` that Ray repeats, which returns when it can be asked.
        first: which of equally busy ones comes first.
        retry_seconds: how long a request waits for one to come back before it fails.
    """

    def __init__(self, what: str, actors: Sequence[Any], *, first: int = 0, retry_seconds: float = 300.0) -> None:
        places = [Place(actor) for actor in actors]
        self.what, self.every = what, places[first % len(places) :] + places[: first % len(places)]
        self.retry_seconds = retry_seconds
        self.loop = Loop(f"llm_gym-{what}s")
        """Everything below runs in it."""

    async def ask(self, request: Callable[[Any], Any], least: int = 0, keys: Sequence[bytes] = ()) -> tuple[Place, Any]:
        """What one of them answers, and which.

        Args:
            request: actor -> the reference to its answer; None as an answer means that it is not ready.
            least: for its `ready`.
            keys: `routing.pieces` of the beginning that it should have seen before.

        Raises:
            PolicyError: the actor refuses, or there was none for `retry_seconds`.
        """
        while True:
            place = await self.pick(keys)
            place.prefixes.add(keys)  # at once: those of a group come together
            place.load += 1
            try:
                found = await answer(request(place.actor))
            except DEATHS as error:
                found, place.reason = None, account(error)
            finally:
                place.load -= 1
            if found is not None:
                return place, found
            self.leave(place, least)

    async def pick(self, keys: Sequence[bytes] = ()) -> Place:
        """One that is there; waits for it."""
        until = time.monotonic() + self.retry_seconds
        while not (there := [place for place in self.every if place.back is None]):
            backs = [place.back for place in self.every if place.back is not None and not place.back.done()]
            left = until - time.monotonic()
            if not backs or left <= 0:
                reasons = "; ".join({place.reason: None for place in self.every})
                raise PolicyError(f"cluster: no {self.what} for {self.retry_seconds:g} s: {reasons}")
            await asyncio.wait(backs, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        cached = [place.prefixes.cached(keys) for place in there]
        return there[choose([place.load for place in there], cached)]

    def leave(self, place: Place, least: int = 0) -> None:
        """Takes an actor for dead, or for not ready, until it says otherwise."""
        if place.back is None:
            place.prefixes.clear()
            place.back = asyncio.ensure_future(self._return(place, least))

    async def _return(self, place: Place, least: int) -> None:
        try:
            await answer(place.actor.ready.remote(least))
        except (*DEATHS, PolicyError) as error:  # for good
            place.reason = account(error)
        else:
            place.back = None


def begun(what: str, kind: Any, options: Sequence[Mapping[str, Any]], *arguments: Any) -> tuple[list[str], list[Any]]:
    """Starts an actor for each of these options; their names, under which other processes find them, and handles.

    Args:
        what: what they are, in the singular.
        kind: the remote class; it has a method `here`, and little to do when it begins.
        options: of each.
        *arguments: of all.

    Raises:
        SettingError: the cluster has no room for them, or one of them cannot begin.
    """
    names = [f"{what}-{i}-{uuid.uuid4().hex[:8]}" for i in range(len(options))]
    pairs = zip(names, options, strict=True)
    actors = [kind.options(name=name, max_concurrency=10_000, **option).remote(*arguments) for name, option in pairs]
    try:
        ray.get([actor.here.remote() for actor in actors], timeout=PLACING)
    except (GetTimeoutError, *DEATHS) as error:
        for actor in actors:
            ray.kill(actor)
        why = account(error)
        if isinstance(error, GetTimeoutError):
            why = f"there was no room for all of them within {PLACING:g} s; free is {ray.available_resources()}."
        raise SettingError(f"cluster.{what}s: got {len(options)}, but {why}") from error
    return names, actors


async def answer(reference: Any) -> Any:
    """What an actor's method came to; who is cancelled cancels it there.

    Raises:
        RayError: of `DEATHS`; the actor has died.
        LLMGymError: the method's own error; PolicyError where it is none of ours.
    """
    try:
        return await reference
    except asyncio.CancelledError:
        with contextlib.suppress(RayError):
            ray.cancel(reference)
        raise
    except RayTaskError as error:
        raise own_error(error) from None


def own_error(error: RayTaskError) -> LLMGymError:
    """The error that an actor's method raised, without Ray's account of where it came from."""
    cause = error.cause
    return cause if isinstance(cause, LLMGymError) else PolicyError(f"cluster: {described(cause)}")


def account(error: Exception) -> str:
    """What has happened, in a line: the first of Ray's, or the last of the trace of an actor that could not begin."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1 if "creation task" in lines[0] else 0].strip() if lines else type(error).__name__
