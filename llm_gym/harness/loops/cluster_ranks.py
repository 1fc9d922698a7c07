"""Learner processes on a Ray cluster: the first is this one, the others are actors, all with a place set aside."""

from __future__ import annotations

import _thread
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llm_gym.concurrency import Thread
from llm_gym.errors import RankError, SettingError
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.distributed.cluster import join, leave
from llm_gym.harness.model.devices import device_of
from llm_gym.policies.ray.places import DEATHS, account, own_error

PATIENCE, ENDING = 5.0, 30.0
"""Seconds that this process has to find out by itself why another has ended; those that others have at the end."""
PLACING = 120.0
"""Seconds that Ray has to find places."""


class RankActor:
    """A learner process; or, for the first, what holds its place."""

    def place(self) -> tuple[str, list[int]]:
        """The address of its machine, and its GPUs."""
        return ray.util.get_node_ip_address(), list(ray.get_gpu_ids())

    def train(self, environment: Mapping[str, str], config: TrainConfig, options: Mapping[str, Any]) -> None:
        """Trains, as a rank among others."""
        from llm_gym.harness.loops.trainer import Trainer

        os.environ.update(environment)
        trainer = Trainer(config, **options)
        trainer.train(rollout_only=not options["learns"])


@contextmanager
def ranks(config: TrainConfig, count: int, options: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts this process is rank 0 of `count`; the others run the same `Trainer`.

    Args:
        config: the run's.
        count: learner processes, this one included.
        options: of the `Trainer`, but its observer; one that does not learn only plays.

    Raises:
        SettingError: there is no room for them.
        RankError: one of them has died.
    """
    joined = join(config.cluster, count)
    try:
        gpus = int(device_of(config.device).type == "cuda")
        actors = _placed(count, gpus)
        first, *others = _where(actors)
        environment = _environment(first[0], count, Counter(host for host, _ in [first, *others]))
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, first[1]))
        out = options["out"]
        options = {**options, "out": None if out is None else Path(out).absolute()}
        running = [
            actor.train.remote(environment(rank, place[0]), config, options)
            for rank, (actor, place) in enumerate(zip(actors[1:], others, strict=True), 1)
        ]
        own = environment(0, first[0])
        os.environ.update(own)
        try:
            with _watched(running):
                yield
            _ended(running)
        finally:
            for name in own:
                del os.environ[name]
    finally:
        if joined:
            leave()


def _placed(count: int, gpus: int) -> list[Any]:
    """An actor for each rank, the first on this machine, where the run folder and the terminal are."""
    here = f"node:{ray.util.get_node_ip_address()}"
    bundles: list[dict[str, float]] = [{"CPU": 1.0} | ({"GPU": float(gpus)} if gpus else {}) for _ in range(count)]
    bundles[0][here] = 0.001
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=PLACING)
    except GetTimeoutError:
        remove_placement_group(group)
        raise SettingError(
            f"--nproc: got {count}, but the cluster has no room for so many learner processes"
            + ", each with a GPU" * bool(gpus)
            + f" (the first on this machine); it has {ray.available_resources()}."
        ) from None
    kind = ray.remote(num_cpus=1, num_gpus=gpus)(RankActor)
    at = (PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(count))
    return [kind.options(scheduling_strategy=place).remote() for place in at]


def _where(actors: list[Any]) -> list[tuple[str, list[int]]]:
    """What each of them says of its place."""
    try:
        found: list[tuple[str, list[int]]] = ray.get([actor.place.remote() for actor in actors])
    except DEATHS as error:
        raise SettingError(f"--nproc: a learner process ended as it began: {account(error)}") from error
    return found


def _environment(host: str, count: int, on: Counter[str]) -> Any:
    """(rank, host) -> torchrun's variables; each process sees its own GPU alone: it is everybody's first."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": host, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    return lambda rank, place: {**shared, "RANK": str(rank), "LOCAL_WORLD_SIZE": str(on[place])}


@contextmanager
def _watched(running: list[Any]) -> Iterator[None]:
    """Ends what goes on in here when another rank has failed and this one does not see it, waiting for it to come."""
    over, failures = threading.Event(), list[BaseException]()

    def watch() -> None:
        left = dict(zip(running, range(1, len(running) + 1), strict=True))
        while left and not over.is_set():
            for reference in ray.wait(list(left), timeout=1.0)[0]:
                rank = left.pop(reference)
                try:
                    ray.get(reference)
                except (*DEATHS, RayTaskError) as error:
                    if not over.wait(PATIENCE):
                        failures.append(_why(rank, error))
                        _thread.interrupt_main()
                    return

    thread = Thread(watch, name="llm_gym-ranks")
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if failures:
            raise failures[0] from None
        raise
    finally:
        over.set()
        thread.join()


def _ended(running: list[Any]) -> None:
    """Waits for the others, which have nothing left to do."""
    for rank, reference in enumerate(running, 1):
        try:
            ray.get(reference, timeout=ENDING)
        except (*DEATHS, RayTaskError) as error:
            raise _why(rank, error) from None
        except GetTimeoutError:
            raise RankError(f"rank {rank} did not end within {ENDING:g} s of the others.") from None


def _why(rank: int, error: Exception) -> Exception:
    if isinstance(error, RayTaskError):
        return own_error(error)
    return RankError(f"rank {rank} is gone: {account(error)}")
