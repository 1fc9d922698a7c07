"""Playing for a run on another machine: tasks come from it over HTTP, whole groups go back (`llmgym work`)."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

import yaml

from llm_gym.access import bearing, token_of
from llm_gym.concurrency import run_here, tries
from llm_gym.core import Completion, Group, Ids, Sampling, Task
from llm_gym.episode_files import encode
from llm_gym.errors import SettingError, ended
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.mixture import Drivers
from llm_gym.harness.learner.weights import read_tensors
from llm_gym.harness.loops.environments import env_specs
from llm_gym.harness.settings import from_dict
from llm_gym.policies import Completer, Policy, make_policy
from llm_gym.policies.http import Remote, RemoteError
from llm_gym.serving.rollouts import VERSION, read_completion, read_sampling

PATIENCE = 60.0
"""Seconds that a trainer may not answer before a player gives up."""


class Source(Protocol):
    """Where a player's completions come from."""

    @property
    def policy(self) -> Completer:
        """What completes."""
        ...

    async def reach(self, version: int, life: str) -> None:
        """Returns when it samples with weights of this version, or later ones, of this life of the trainer."""
        ...

    def close(self) -> None:
        """Frees it."""
        ...


class TrainersEngine:
    """The engine of the run itself, asked over HTTP."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self.policy = self

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """A completion, sampled where the run is.

        Raises:
            RemoteError: no answer, or the engine failed.
        """
        body = {"context": context.tolist(), "sampling": asdict(sampling), "seed": seed}
        return read_completion(await self._remote.call("POST", "/v1/complete", body))

    async def reach(self, version: int, life: str) -> None:
        """It is there already."""

    def close(self) -> None:
        """Nothing is held."""


class OwnEngine:
    """An engine of this machine, which gets the run's weights when there are newer ones."""

    def __init__(self, remote: Remote, model: str | None, engine: str, options: Mapping[str, Any]) -> None:
        self._remote = remote
        self.policy: Policy = make_policy(model, engine=engine, version=-1, **options)
        self._loading = asyncio.Lock()
        self._life = ""

    async def reach(self, version: int, life: str) -> None:
        """Downloads the newest weights, if the engine's are older than these or of a trainer that is no more."""
        async with self._loading:
            if self._life == life and self.policy.version >= version:
                return
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.safetensors"
                got = int(await self._remote.download("/v1/weights", file, header=VERSION))
                self.policy.load(read_tensors(Path(folder)).items(), version=got)
                self._life = life

    def close(self) -> None:
        """Ends the engine."""
        self.policy.close()


def work(
    url: str,
    *,
    engine: str | None = None,
    options: Mapping[str, Any] | None = None,
    groups: int = 8,
    name: str | None = None,
    on_group: Callable[[Group], None] = lambda group: None,
    tell: Callable[[str], None] = lambda text: None,
) -> int:
    """Plays for the run at `url` until it is over; returns how many groups were taken.

    Args:
        url: where a run hands out its tasks (setting stream.serve).
        engine: an engine of this machine; None: the run's own, over HTTP.
        options: of that engine.
        groups: played at once.
        name: what the run calls this player; None: host and process.
        on_group: told of each group that was taken.
        tell: told in a line what went wrong.

    Raises:
        SettingError: no such run, a wrong token, or an environment that cannot be made here.
        RemoteError: the run does not answer any more.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingError(f"url: got {url!r}, want the address of a run, such as http://trainer:8900.")

    async def main() -> int:
        remote = Remote(url, headers=bearing(token_of(None)))
        try:
            told = await _described(remote)
            player = _Player(remote, name or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:4]}", tell)
            return await player.play(told, engine, options or {}, groups, on_group)
        finally:
            await remote.close()

    return run_here(main())


async def _described(remote: Remote) -> Mapping[str, Any]:
    """What the run says of itself.

    Raises:
        SettingError: it does not answer, or refuses.
    """
    try:
        told: Mapping[str, Any] = await remote.call("GET", "/v1/run", seconds=30)
    except RemoteError as error:
        raise _refused(remote, error) from error
    return told


def _refused(remote: Remote, error: RemoteError) -> SettingError:
    """What a player that is refused is told."""
    if error.status == 404:
        want = "want the address that a run with stream.serve prints, such as http://trainer:8900"
        return SettingError(f"url: no run hands out tasks at {remote.url!r}; {want}.")
    return SettingError(f"url: {ended(error)}")


class _Player:
    """Leases, plays and posts, several groups at once."""

    def __init__(self, remote: Remote, name: str, tell: Callable[[str], None]) -> None:
        self._remote, self._name, self._tell = remote, name, tell
        self._taken = 0

    async def play(
        self,
        told: Mapping[str, Any],
        engine: str | None,
        options: Mapping[str, Any],
        groups: int,
        on_group: Callable[[Group], None],
    ) -> int:
        config = from_dict(TrainConfig, yaml.safe_load(told["config"]))
        found = env_specs(config)
        if engine is not None and not told["weights"]:
            raise SettingError("--policy: the run hands out no weights; begin it with --set stream.serve_weights=true.")
        source: Source = (
            TrainersEngine(self._remote) if engine is None else OwnEngine(self._remote, config.model, engine, options)
        )
        drivers = Drivers(found, source.policy, time_limit=config.time_limit)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(groups):
                    workers.create_task(self._work(source, drivers, on_group))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            drivers.close()
            source.close()
        return self._taken

    async def _work(self, source: Source, drivers: Drivers, on_group: Callable[[Group], None]) -> None:
        while True:
            lease = await self._call(f"/v1/task?{urlencode({'player': self._name})}")
            if lease is None:
                continue
            if lease is OVER:
                return
            await source.reach(lease["version"], lease["life"])
            renewing = asyncio.ensure_future(self._renew(lease))
            try:
                how = {**lease["how"], "sampling": read_sampling(lease["how"]["sampling"])}
                group = await drivers.play_group(Task(**lease["task"]), **how)
            finally:
                renewing.cancel()
            body = {"episodes": [encode(episode) for episode in group.episodes]}
            taken = await self._call(f"/v1/group/{lease['lease']}", body)
            if taken is OVER:
                return
            if taken is not None:
                self._taken += 1
                on_group(group)

    async def _renew(self, lease: Mapping[str, Any]) -> None:
        while True:
            await asyncio.sleep(lease["seconds"] / 4)
            with suppress(RemoteError):
                await self._remote.call("POST", f"/v1/lease/{lease['lease']}", seconds=lease["seconds"])

    async def _call(self, path: str, body: Any = None) -> Any:
        """The answer; OVER at the run's end; None where there is none, or the run refuses it and says why.

        What does not get through is tried again: a group may be posted more than once.

        Raises:
            RemoteError: the run does not answer for `PATIENCE` seconds.
            SettingError: it refuses this player.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE
        async for _ in tries(lambda: until):
            try:
                return await self._remote.call("POST", path, body)
            except RemoteError as error:
                if error.status == 410:
                    return OVER
                if error.status in (401, 403, 404):  # 404: another server has the port now
                    raise _refused(self._remote, error) from error
                if not error.passing:
                    self._tell(f"A group was not taken: {error}")
                    return None
                if loop.time() > until:
                    if self._taken:  # a run that is over may be gone before everybody has heard
                        return OVER
                    raise
        raise AssertionError


OVER = object()
"""The run has ended."""
