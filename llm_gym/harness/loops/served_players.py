"""Players behind HTTP: the run hands out its tasks, and others play them (`llmgym work`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file

from llm_gym.access import token_of
from llm_gym.core import Completion, Group, Ids, Sampling, Task
from llm_gym.errors import ConfigError
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.mixture import EnvSpec, PlayersElsewhere
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.model.loading import plain_tensors
from llm_gym.harness.settings import dump
from llm_gym.models.plain import as_saved
from llm_gym.policies import Policy
from llm_gym.serving.leases import Board
from llm_gym.serving.rollouts import RolloutDoor


class ServedPlayers(PlayersElsewhere):
    """`Drivers` whose episodes are played elsewhere.

    Args:
        config: the run's.
        found: its environments.
        policy: its engine, which players may ask.
        learner: whose weights players may download.
        folder: where those are written.
        version: of the weights now.
        observer: is told where players must ask.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(
        self,
        config: TrainConfig,
        found: Sequence[EnvSpec],
        policy: Policy,
        learner: Learner,
        *,
        folder: Path,
        version: int,
        observer: Observer,
    ) -> None:
        host, port = config.stream.address()
        self._board = Board(config.stream.lease_seconds)
        self._policy, self._learner, self._folder = policy, learner, folder
        self._weights = config.stream.serve_weights
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._door = RolloutDoor(
                host,
                port,
                token=token_of(None),
                run={"config": dump(config)},
                names=[spec.name for spec in found],
                vocabulary=learner.backbone.config.vocab_size,
                complete=self._complete,
                board=self._board,
                newest=lambda: max(self._door.state[0], self._policy.version),
                tell=observer.on_note,
            )
        except OSError as error:
            raise ConfigError(f"stream.serve: cannot listen on {host}, port {port}: {error.strerror}.") from error
        self.publish(version)
        self.port = self._door.port
        """Where players ask."""
        observer.on_note(f"stream.serve: handing out tasks; play them by: llmgym work http://{host}:{self.port}")

    def publish(self, version: int) -> None:
        """The weights have this version from now on; players get them."""
        file = None
        if self._weights:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"weights-{version}.safetensors"
            model = self._learner.model
            tensors = {name: tensor.detach().cpu() for name, tensor in as_saved(model, plain_tensors(model))}
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
        (_, before), self._door.state = self._door.state, (version, file)
        if before is not None and before != file:
            with suppress(FileNotFoundError):
                before.unlink()

    async def play_group(self, task: Task, *, group_size: int, seed: int, sampling: Sampling) -> Group:
        """A group of one task, beside others that were begun."""
        self._loop = asyncio.get_running_loop()
        offered = self._board.offer(task, {"group_size": group_size, "seed": seed, "sampling": sampling})
        return await asyncio.wrap_future(offered)

    def close(self) -> None:
        """Tells players that the run is over."""
        self._door.close()
        for file in self._folder.glob("weights-*.safetensors"):
            file.unlink()
        with suppress(OSError):
            self._folder.rmdir()

    async def _complete(self, context: Ids, sampling: Sampling, seed: int | None) -> Completion:
        """A completion by the run's engine, in the loop where its rollouts are."""
        if self._loop is None:
            raise RuntimeError("The run has not begun to play.")
        asked = self._policy.complete(context, sampling, seed=seed)
        future: Future[Completion] = asyncio.run_coroutine_threadsafe(asked, self._loop)
        return await asyncio.wrap_future(future)
