"""A Ray cluster: joined, or started on this machine, and looked at before anything is placed on it."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llm_gym.errors import ConfigError, SettingError
from llm_gym.harness.bounds import Within
from llm_gym.harness.settings import checked

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What has no GPU set aside sees those there are.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray prints a page for every process that dies and every call that is repeated; the run says what it means for it.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
"""What Ray reads when it is imported."""
ANSWER = 5.0
"""Seconds that the head of a cluster has to answer."""


@checked("cluster")
@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Several machines, or one as if it were several: engines, players and learners in processes that Ray places."""

    backend: Literal["ray"] | None = None
    """`ray`, or None: everything on this machine, in the processes of the run."""
    address: str | None = None
    """Of a running cluster: `auto` (this machine is one of it) or host:port of its head. None: one is started here."""
    engines: Annotated[int, Within("[1, 4096]")] = 1
    """Engines, each with `policy.vllm.tensor_parallel_size` GPUs where there are any."""
    players: Annotated[int, Within("[0, 4096]")] = 0
    """Processes for environments; 0: they are played in those of the learner."""
    gpus_per_engine: Annotated[float | None, Within("[0, 64]")] = None
    """GPUs that Ray sets aside for an engine; None: as many as it uses, on a cluster that has some."""


def check_cluster(config: ClusterConfig) -> None:
    """Looks whether a cluster can be joined from here.

    Raises:
        ConfigError: Ray is not installed, or settings are for a cluster that was not asked for.
    """
    if config.backend is None and config != ClusterConfig():
        given = next(name for name in ("address", "engines", "players", "gpus_per_engine") if _given(config, name))
        raise ConfigError(
            f"cluster.{given}: got {getattr(config, given)!r}, but cluster.backend is None; set it to ray."
        )
    if config.backend is not None and importlib.util.find_spec("ray") is None:
        raise ConfigError("cluster.backend: 'ray' is not installed; `pip install 'llm-gym[ray]'` has it.")


def join(config: ClusterConfig, ranks: int) -> bool:
    """Joins the cluster, or starts one; whether it did, for this process may be in it already.

    Args:
        config: the run's.
        ranks: learner processes.

    Raises:
        SettingError: it cannot be joined, or has too few processors for the run.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    need = config.engines + config.players + ranks
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        options |= {"num_cpus": max(need, os.cpu_count() or 1), "include_dashboard": False, "address": "local"}
    else:
        options["address"] = config.address
        if config.address != "auto":
            _check_answers(config.address)
    try:
        with _own_signals():
            ray.init(**options)
    except Exception as error:  # Ray raises this very class where a node does not start in time
        raise SettingError(_refusal(config.address, error)) from error
    have = ray.cluster_resources().get("CPU", 0)
    if have < need:
        ray.shutdown()
        raise SettingError(
            f"cluster: an engine, a player and a learner process take a CPU each, {need} in all, and the cluster has "
            f"{have:g}; ask for less, or start Ray with more (`ray start --num-cpus`)."
        )
    return True


@contextmanager
def _own_signals() -> Iterator[None]:
    """What this process does on signals stays: Ray ends a process with a page of addresses."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def leave() -> None:
    """Leaves the cluster, and ends one that was started here."""
    import ray

    ray.shutdown()


def gpus_of_engine(config: ClusterConfig, used: int) -> float:
    """GPUs to set aside for each engine, which uses so many where there are any."""
    if config.gpus_per_engine is not None:
        return config.gpus_per_engine
    import ray

    return float(used) if ray.cluster_resources().get("GPU", 0) else 0.0


def _given(config: ClusterConfig, name: str) -> bool:
    return bool(getattr(config, name) != getattr(ClusterConfig(), name))


def _check_answers(address: str) -> None:
    """Looks whether somebody is there: Ray asks for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, ValueError) as error:
        raise SettingError(
            f"cluster.address: got {address!r}, want auto or HOST:PORT of a Ray cluster, which `ray start --head` "
            f"starts; nobody answers there: {error}."
        ) from error


def _refusal(address: str | None, error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if address is None:
        return f"cluster: Ray does not start here: {said}"
    if address == "auto" and isinstance(error, ConnectionError):
        return "cluster.address: got 'auto', but no Ray cluster runs on this machine; `ray start --head` starts one."
    return (
        f"cluster.address: {address!r} does not let this machine in; it may have another token (copy the head's "
        f"~/.ray/auth_token to here, or set RAY_AUTH_TOKEN) or another version of Ray: {said}"
    )
