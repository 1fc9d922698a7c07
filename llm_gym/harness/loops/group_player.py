"""What plays: the engine that samples, the environments, and the problems that the policy is measured on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llm_gym.concurrency import Loop
from llm_gym.core import Episode, Group, Sampling, Task
from llm_gym.harness.algorithms.rewards import RewardWatch
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.mixture import Drivers, EnvSpec
from llm_gym.harness.distributed.cluster import join, leave
from llm_gym.harness.evaluation.evaluator import Evaluation
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.preparation import Prepared
from llm_gym.harness.weight_sync.sync import Sync
from llm_gym.policies import Abilities
from llm_gym.rollouts.driver import Driver, OnEpisode

if TYPE_CHECKING:
    from llm_gym.harness.loops.remote_players import RemotePlayers
    from llm_gym.harness.loops.served_players import ServedPlayers


class GroupPlayer:
    """Starts the engine of a run, with the learner's weights, and plays groups with it.

    Args:
        config: the run's.
        prepared: its environments.
        learner: whose weights sample.
        observer: is told of the phases `engine`, `rollout` and `eval`.
        folder: the run folder.
        version: of the weights now.

    Raises:
        SyncError: engine and learner disagree from the start.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        learner: Learner,
        observer: Observer,
        *,
        folder: Path,
        version: int,
    ) -> None:
        self.config, self.world, self.observer = config, learner.world, observer
        observer.on_phase("engine", 1)
        most, limit = config.sampling.max_tokens, config.time_limit
        with ExitStack() as opened:  # what was begun ends again, if what follows cannot begin
            if config.cluster.backend is not None and join(config.cluster, self.world.size):
                opened.callback(leave)
            self.sync = Sync(config, learner, folder=folder / "sync", version=version, tell=observer.on_note)
            opened.callback(self.sync.close)
            self.policy = self.sync.policy
            self.drivers = self._drivers(prepared.env_specs, learner, folder, version)
            opened.callback(self.drivers.close)
            self.evaluation = Evaluation(
                prepared.eval_tasks, self.policy, config.eval, max_tokens=most, time_limit=limit
            )
            opened.callback(self.evaluation.close)
            self._opened = opened.pop_all()
        self._loop: Loop | None = None
        self.rewards = RewardWatch(min(2, config.prompts_per_step))

    def _drivers(
        self, found: Sequence[EnvSpec], learner: Learner, folder: Path, version: int
    ) -> Drivers | RemotePlayers | ServedPlayers:
        config = self.config
        if config.stream.serve is not None:
            from llm_gym.harness.loops.served_players import ServedPlayers

            where, told = folder / "served", self.observer
            return ServedPlayers(config, found, self.policy, learner, folder=where, version=version, observer=told)
        if not config.cluster.players:
            return Drivers(found, self.policy, time_limit=config.time_limit)
        from llm_gym.harness.loops.remote_players import RemotePlayers

        return RemotePlayers(
            found, self.policy, count=config.cluster.players, time_limit=config.time_limit, world=self.world
        )

    def play(self, tasks: Sequence[Task]) -> list[Group]:
        """`group_size` episodes of each of these tasks, this rank's own."""
        config, size = self.config, self.config.group_size
        count = self._counting("rollout", len(tasks) * size)
        return self.drivers.play(tasks, group_size=size, seed=config.seed, sampling=config.sampling, on_episode=count)

    @property
    def version(self) -> int:
        """Of the weights that sample now."""
        version: int = self.policy.version
        return version

    def publish(self, version: int) -> None:
        """Tells players elsewhere that the engine has weights of this version now."""
        self.drivers.publish(version)

    def begin(self, task: Task) -> Future[Group]:
        """A group of this task, played in the loop of the rollouts; nobody waits for it here."""
        if self._loop is None:
            self._loop = Loop("llm_gym-rollouts")
            Abilities.of(self.policy).serve_in(self._loop)
        config = self.config
        play = self.drivers.play_group(task, group_size=config.group_size, seed=config.seed, sampling=config.sampling)
        return self._loop.submit(play)

    def wait(self, begun: Sequence[Future[Group]]) -> list[Group]:
        """The groups that were begun."""
        size = self.config.group_size
        self.observer.on_phase("rollout", len(begun) * size)
        for done, future in enumerate(as_completed(begun), 1):
            future.result()  # what every episode would run into is told at once
            self.observer.on_progress(done * size)
        return [future.result() for future in begun]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the learner works: the engine sleeps if the run wants that, or makes no step in this process."""
        with self.sync.engine_asleep(), Abilities.of(self.policy).paused():
            yield

    def evaluate(self) -> tuple[dict[str, float], dict[str, list[Episode]]]:
        """A row of `eval/...` metrics, and the transcripts of each environment; ranks share the problems."""
        return self.evaluation(self._play)

    def close(self) -> None:
        """Closes the environments and the engine."""
        if self._loop is not None:
            self._loop.stop()
        self._opened.close()

    def _play(
        self, driver: Driver, phase: str, seeds: Sequence[int], group_size: int, sampling: Sampling
    ) -> list[Episode]:
        mine = self.world.shard(seeds)
        count = self._counting(phase, len(mine) * group_size)
        played = driver.run(mine, group_size=group_size, sampling=sampling, seed=self.config.seed, on_episode=count)
        episodes = self.world.unshard(played, phase, each=group_size)
        self.rewards.see(episodes)
        return episodes

    def _counting(self, phase: str, total: int) -> OnEpisode:
        """Begins a phase; call what is returned with each of its episodes."""
        self.observer.on_phase(phase, total)
        done = itertools.count(1)
        return lambda episode: self.observer.on_progress(next(done))
