"""The ways of weights to an engine: a table of transports."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_gym.errors import ConfigError, import_of, unknown
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.model.loading import adapter_tensors, export, plain_tensors
from llm_gym.models.plain import as_saved

Tensors = Iterable[tuple[str, Tensor]]
Seen = Callable[[Tensors], Tensors]
"""What every tensor that is sent passes through, as it goes."""
Push = Callable[[Any, Any, int, Path, Seen], None]
"""(model, policy, version, folder, seen): brings the engine the model's weights, as `version`.

`folder` does not exist, may be made, and is gone again at the end. Every tensor that should arrive goes through `seen`,
which takes the checksums that the proof compares; a mode that moves nothing need not call it.
"""


def _share(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.refresh(version=version)


def _copy(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.load(seen(plain_tensors(model)), version=version)


def _load(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.load(seen(as_saved(model, plain_tensors(model))), version=version)


def _broadcast(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.load_broadcast(seen(as_saved(model, plain_tensors(model))), version=version)


def _load_adapter(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    tensors, config = adapter_tensors(model)
    policy.load_adapter(list(seen(tensors.items())), config, version=version)


def _load_folder(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    with written(model, folder):
        policy.load_folder(folder, version=version)
    deque(seen(as_saved(model, plain_tensors(model))), maxlen=0)


def _restart(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    with written(model, folder):
        policy.restart(folder, version=version)
    deque(seen(as_saved(model, plain_tensors(model))), maxlen=0)


@contextmanager
def written(model: Any, folder: Path) -> Iterator[None]:
    """While it lasts, `folder` is a checkpoint of the plain model."""
    try:
        export(model, folder)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way for weights to reach an engine."""

    push: Push
    engines: tuple[str, ...]
    """Names of `policies.ENGINES` that it works with."""
    what: str
    """What happens, in a few words."""
    adapters: bool | None = None
    """Whether the learner must (True) or must not (False) train adapters; None: either."""
    automatic: bool = False
    """Whether `auto` considers it; the others are slower by construction, and there to compare with."""
    over_base: bool = False
    """Whether the engine must hold the base model, without adapters, beneath what is sent."""
    sharded: bool = True
    """Whether it also works for a learner whose weights are split over several processes."""
    in_place: bool = False
    """Whether the engine runs the learner's own module, so that nothing has to move."""
    in_flight: bool = True
    """Whether requests in flight go on with the new weights."""
    apart: bool = False
    """Whether it works for an engine in a process of its own, on a cluster."""

    def fits(self, config: TrainConfig, engine: str, sharded: bool) -> bool:
        """Whether it works with a run's engine and learner; `sharded`: the weights are split over processes."""
        apart = config.lora is None or config.lora.served_apart or not self.over_base
        known = engine in self.engines and self.adapters in (None, config.lora is not None)
        ahead = self.in_flight or not config.stream.max_staleness
        placed = self.apart or config.cluster.backend is None
        return known and apart and ahead and placed and (self.sharded or not sharded)


MODES = {
    "shared": Mode(
        _share,
        ("transformers",),
        "the engine runs the learner's module itself",
        automatic=True,
        sharded=False,
        in_place=True,
        in_flight=False,
    ),
    "copy": Mode(_copy, ("transformers",), "every tensor is copied into a second module", apart=True),
    "tensors": Mode(
        _load, ("vllm",), "every tensor is copied within the process", adapters=False, automatic=True, apart=True
    ),
    "file": Mode(
        _load, ("server",), "every tensor goes through a file in shared memory", adapters=False, automatic=True
    ),
    "adapter": Mode(
        _load_adapter,
        ("vllm", "server"),
        "the adapter alone is replaced",
        adapters=True,
        automatic=True,
        over_base=True,
        apart=True,
    ),
    "merged": Mode(
        _load,
        ("vllm", "server"),
        "as `tensors` or `file`, the adapter folded in",
        adapters=True,
        automatic=True,
        apart=True,
    ),
    "nccl": Mode(_broadcast, ("server",), "vLLM's own broadcast from GPU to GPU (not verified)", sharded=False),
    "disk": Mode(
        _load_folder, ("vllm", "server", "sglang"), "a checkpoint is written, and loaded again", sharded=False
    ),
    "restart": Mode(
        _restart, ("vllm",), "a checkpoint is written, and a new engine started on it", sharded=False, in_flight=False
    ),
}
"""Name -> what it does."""


def mode_of(name: str) -> Mode:
    """The mode of that name in `MODES`, or the `Mode` at `package.module:name`.

    Raises:
        ConfigError: neither.
    """
    module, colon, attribute = name.partition(":")
    if name in MODES:
        return MODES[name]
    if not colon:
        raise ConfigError(unknown("policy.sync", name, ["auto", *MODES]))
    found = getattr(import_of("policy.sync", module, name), attribute, None)
    if not isinstance(found, Mode):
        raise ConfigError(f"policy.sync: got {name!r}, which is {found!r:.80}, want a `Mode` (see {__name__}).")
    return found


def modes_of(config: TrainConfig, engine: str, *, sharded: bool = False) -> list[str]:
    """The modes to choose from: the one asked for, or for `auto` those worth measuring.

    `sharded`: whether the learner's weights are split over several processes.

    Raises:
        ConfigError: the mode asked for is unknown, or does not work with this engine.
    """
    wanted, adapters = config.policy.sync, config.lora is not None
    fitting = [name for name, mode in MODES.items() if mode.fits(config, engine, sharded)]
    if wanted == "auto":
        return [name for name in fitting if MODES[name].automatic] or fitting
    if not mode_of(wanted).fits(config, engine, sharded):
        kind = "" if config.lora is None or config.lora.served_apart else f"{config.lora.kind!r} "
        which = (
            f"engine {engine!r} {'with' if adapters else 'without'} {kind}adapters" + sharded * " and a split learner"
        )
        which += " while rollouts go on (stream.max_staleness)" * bool(config.stream.max_staleness)
        raise ConfigError(f"policy.sync: {wanted!r} does not work with {which}; valid: auto, {', '.join(fitting)}.")
    return [wanted]
