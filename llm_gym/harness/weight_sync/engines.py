"""What a run must know of each engine that it can give new weights: a table, so that nothing else names engines."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.distributed.cluster import check_cluster, gpus_of_engine
from llm_gym.harness.distributed.world import World
from llm_gym.harness.weight_sync.transports import MODES, mode_of, modes_of
from llm_gym.policies import ENGINES


def _builtin_options(config: TrainConfig, mode: str) -> dict[str, Any]:
    return {"max_rows": config.policy.max_rows}


def _vllm_options(config: TrainConfig, mode: str) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": config.optimizer.dtype, **config.policy.vllm}
    if config.lora is not None and mode_of(mode).over_base:
        options["lora_rank"] = config.lora.rank
    if config.policy.sleep:
        options["enable_sleep_mode"] = True
    return options


def _server_options(config: TrainConfig, mode: str) -> dict[str, Any]:
    return {"servers": list(config.policy.servers), **config.policy.server}


def _check_nothing(config: TrainConfig, world: World) -> None:
    pass


def _check_vllm(config: TrainConfig, world: World) -> None:
    from llm_gym.policies.vllm.policy import check as check_arguments

    check_arguments(config.policy.vllm, ranks=world.size)


def _check_servers(config: TrainConfig, world: World) -> None:
    from llm_gym.policies.vllm_server.policy import ServerPolicy

    _check_addresses(config, ServerPolicy)


def _check_sglang(config: TrainConfig, world: World) -> None:
    from llm_gym.policies.sglang import SGLangPolicy

    _check_addresses(config, SGLangPolicy)
    if world.size > 1:
        raise ConfigError(f"policy.engine: 'sglang' samples for one training process, and there are {world.size}.")


def _check_addresses(config: TrainConfig, engine: Callable[..., Any]) -> None:
    from llm_gym.access import token_of
    from llm_gym.policies.vllm_server.addresses import addresses

    addresses(config.policy.servers)
    known = inspect.signature(engine).parameters.keys() - {"model", "servers", "version", "on_wait", "ranks"}
    for name in config.policy.server.keys() - known:
        raise ConfigError(unknown("policy.server option", name, known))
    token_of(config.policy.server.get("token"), "policy.server.token")


def _always(config: TrainConfig) -> bool:
    return True


def _vllm_installed(config: TrainConfig) -> bool:
    return vllm_at_hand()


def _servers_named(config: TrainConfig) -> bool:
    return bool(config.policy.servers) and config.policy.engine != "sglang"


def _sglang_named(config: TrainConfig) -> bool:
    return bool(config.policy.servers) and config.policy.engine == "sglang"


@dataclass(frozen=True, slots=True)
class Receiver:
    """An engine that a run can give new weights; its class is a `policies.WeightReceiver`."""

    options: Callable[[TrainConfig, str], dict[str, Any]]
    """(config, mode) -> its keyword arguments in a run that sends weights in this mode."""
    check: Callable[[TrainConfig, World], None] = _check_nothing
    """Looks at its settings before anything is loaded."""
    section: str = ""
    """The field of `PolicyConfig` that is for it alone."""
    at_hand: Callable[[TrainConfig], bool] = _always
    """Whether it can be started here (it is not imported)."""
    module: bool = False
    """Whether it serves a transformers module, that of the learner or another, rather than a folder."""
    shared: bool = False
    """Whether all ranks use the same one, to which rank 0 sends; else each has its own."""
    addressed: bool = False
    """Whether it is reached at addresses that the run names."""
    sleeps: bool = False
    """Whether it can give its memory back while the learner trains, on a CUDA device."""
    ties_by_folder: bool = False
    """Whether it learns from its folder if embedding and head are one, so that it must begin on one where they are."""
    untied: str = "engines and exports hold both"
    """What to say where embedding and head, one matrix in the model, become two."""
    slow_start: bool = False
    """Whether starting it takes a minute."""
    placed: bool = False
    """Whether a cluster can hold some of it."""
    maker: str = ""
    """The name in `policies.ENGINES` of what is made; empty: its own."""


RECEIVERS = {
    "transformers": Receiver(_builtin_options, module=True, placed=True),
    "vllm": Receiver(
        _vllm_options,
        _check_vllm,
        section="vllm",
        at_hand=_vllm_installed,
        sleeps=True,
        ties_by_folder=True,
        slow_start=True,
        placed=True,
    ),
    "server": Receiver(
        _server_options,
        _check_servers,
        section="server",
        at_hand=_servers_named,
        shared=True,
        addressed=True,
        untied="the servers must hold both, as with `llmgym serve MODEL --set load_format=dummy "
        "--set 'hf_overrides={tie_word_embeddings: false}'`",
    ),
    "sglang": Receiver(
        _server_options,
        _check_sglang,
        section="server",
        at_hand=_sglang_named,
        addressed=True,
        untied="the servers must hold both",
    ),
}
"""Engine name -> what a run must know of it; engines that are not here cannot sample a training run."""


def vllm_at_hand() -> bool:
    """Whether vLLM is installed (it is not imported: that takes ten seconds)."""
    return importlib.util.find_spec("vllm") is not None


def engine_of(config: TrainConfig) -> str:
    """The engine that samples; `auto` is a server where one is named, else the built-in engine.

    Raises:
        ConfigError: an unknown engine, or one that cannot sample this run.
    """
    policy = config.policy
    name = ("server" if policy.servers else "transformers") if policy.engine == "auto" else policy.engine
    if name not in ENGINES:
        raise ConfigError(unknown("policy.engine", name, ["auto", *ENGINES]))
    if name not in RECEIVERS:
        raise ConfigError(f"policy.engine: {name!r} cannot be given new weights, so it cannot sample a training run.")
    if (addressed := RECEIVERS[name].addressed) != bool(policy.servers):
        able = " and ".join(repr(other) for other, receiver in RECEIVERS.items() if receiver.addressed)
        want = "which needs addresses" if addressed else f"but only {able} have addresses; leave one of the two"
        raise ConfigError(f"policy.servers: got {list(policy.servers)} with engine {name!r}, {want}.")
    return name


def receiver_of(config: TrainConfig) -> Receiver:
    """What a run must know of its engine; on a cluster all ranks share some of them, each in a process of its own."""
    name = engine_of(config)
    receiver = RECEIVERS[name]
    if config.cluster.backend is None:
        return receiver
    return replace(
        receiver,
        options=partial(_placed_options, name, receiver),
        module=False,
        shared=True,
        ties_by_folder=False,
        untied="every engine must hold both",
        maker=config.cluster.backend,
    )


def _placed_options(name: str, receiver: Receiver, config: TrainConfig, mode: str) -> dict[str, Any]:
    options = receiver.options(config, mode)
    if receiver.module:
        options["dtype"] = getattr(torch, config.optimizer.dtype)
    gpus = gpus_of_engine(config.cluster, int(options.get("tensor_parallel_size", 1)))
    return {"kind": name, "options": options, "engines": config.cluster.engines, "gpus": gpus}


def engine_options(config: TrainConfig, mode: str) -> dict[str, Any]:
    """The engine's keyword arguments for a run that uses `mode`."""
    return receiver_of(config).options(config, mode)


def check(config: TrainConfig, world: World | None = None) -> None:
    """Looks at everything in `policy`, before a model is loaded; `world`: the processes that train together.

    Raises:
        SettingError: an engine, a mode or an engine argument that cannot work in this run.
    """
    engine, world = engine_of(config), world or World()
    receiver = RECEIVERS[engine]
    modes_of(config, engine, sharded=world.sharded)
    for section in sorted({other.section for other in RECEIVERS.values()} - {"", receiver.section}):
        if given := getattr(config.policy, section):
            raise ConfigError(f"policy.{section}: got {dict(given)}, but engine {engine!r} takes none of it.")
    if config.policy.sleep and not (receiver.sleeps and torch.cuda.is_available()):
        able = ", ".join(name for name, other in RECEIVERS.items() if other.sleeps)
        raise ConfigError(
            f"policy.sleep: only {able} on a CUDA device can give its memory back while the learner trains."
        )
    if config.policy.sleep and config.cluster.backend is not None:
        raise ConfigError("policy.sleep: on a cluster engines share no memory with the learner; leave it.")
    if config.policy.sleep and config.stream.max_staleness:
        raise ConfigError(
            "policy.sleep: the engine cannot sleep while rollouts go on; leave it, or set stream.max_staleness=0."
        )
    check_cluster(config.cluster)
    if config.cluster.backend is not None and not receiver.placed:
        able = " and ".join(repr(name) for name, other in RECEIVERS.items() if other.placed)
        raise ConfigError(f"cluster.backend: engine {engine!r} is not placed on a cluster; policy.engine: {able} are.")
    receiver.check(config, world)


def sync_modes(engine: str, *, adapters: bool) -> list[str]:
    """How new weights can reach `engine`; those that `policy.sync: auto` chooses from come first."""
    fitting = {name: m for name, m in MODES.items() if engine in m.engines and m.adapters in (None, adapters)}
    return sorted(fitting, key=lambda name: not fitting[name].automatic)
