"""The sampler of a training run, and how the learner's weights reach it: a table of modes, each proven."""

from __future__ import annotations

import inspect
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_gym.core import Sampling
from llm_gym.errors import ConfigError, PolicyError, SyncError, unknown
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.distributed.world import World
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import adapter_tensors, export, merged, plain_tensors, prepare
from llm_gym.harness.runs.metrics import clock
from llm_gym.harness.weight_sync.verify import ProbePrompts, WeightSyncCheck
from llm_gym.models.checksums import recorded
from llm_gym.models.folding import apart, untied
from llm_gym.models.plain import as_saved
from llm_gym.policies import ENGINES, make_policy

Tensors = Iterable[tuple[str, Tensor]]
Seen = Callable[[Tensors], Tensors]
"""What every tensor that is sent passes through, as it goes."""
Push = Callable[[Any, Any, int, Path, Seen], None]
"""Of (model, policy, version, folder to write, seen)."""


def _share(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.refresh(version=version)


def _copy(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.load(seen(plain_tensors(model)), version=version)


def _load(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.load(seen(as_saved(model, plain_tensors(model))), version=version)


def _load_adapter(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    tensors, config = adapter_tensors(model)
    policy.load_adapter(list(seen(tensors.items())), config, version=version)


def _load_folder(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    with _written(model, folder):
        policy.load_folder(folder, version=version)
    deque(seen(as_saved(model, plain_tensors(model))), maxlen=0)


def _restart(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    with _written(model, folder):
        policy.restart(folder, version=version)
    deque(seen(as_saved(model, plain_tensors(model))), maxlen=0)


@contextmanager
def _written(model: Any, folder: Path) -> Iterator[None]:
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
    adapters: bool | None
    """Whether the learner must (True) or must not (False) train adapters; None: either."""
    automatic: bool
    """Whether `auto` considers it; the others are slower by construction, and there to compare with."""
    what: str
    over_base: bool = False
    """Whether the engine must hold the base model, without adapters, beneath what is sent."""
    sharded: bool = True
    """Whether it also works for a learner whose weights are split over several processes."""

    def fits(self, config: TrainConfig, engine: str, sharded: bool) -> bool:
        """Whether it works with a run's engine and learner; `sharded`: the weights are split over processes."""
        apart = config.lora is None or config.lora.served_apart or not self.over_base
        known = engine in self.engines and self.adapters in (None, config.lora is not None)
        return known and apart and (self.sharded or not sharded)


MODES = {
    "shared": Mode(_share, ("transformers",), None, True, "the engine runs the learner's module itself", sharded=False),
    "copy": Mode(_copy, ("transformers",), None, False, "every tensor is copied into a second module"),
    "tensors": Mode(_load, ("vllm",), False, True, "every tensor is copied within the process"),
    "file": Mode(_load, ("server",), False, True, "every tensor goes through a file in shared memory"),
    "adapter": Mode(_load_adapter, ("vllm", "server"), True, True, "the adapter alone is replaced", over_base=True),
    "merged": Mode(_load, ("vllm", "server"), True, True, "as `tensors` or `file`, the adapter folded in"),
    "disk": Mode(
        _load_folder, ("vllm", "server"), None, False, "a checkpoint is written, and loaded again", sharded=False
    ),
    "restart": Mode(
        _restart, ("vllm",), None, False, "a checkpoint is written, and a new engine started on it", sharded=False
    ),
}
"""Name -> what it does."""
UNTIED = (
    "the servers must hold both, as with `llmgym serve MODEL --set load_format=dummy "
    "--set 'hf_overrides={tie_word_embeddings: false}'`"
)
BURST, CONTEXT, TOKENS = 64, 32, 32
"""What is sampled to measure a mode: at most so many rows, their length, new tokens of each."""


def engine_of(config: TrainConfig) -> str:
    """The engine that samples; `auto` is a server where one is named, else the built-in engine.

    Raises:
        ConfigError: an unknown engine, or one that cannot sample this run.
    """
    policy = config.policy
    name = ("server" if policy.servers else "transformers") if policy.engine == "auto" else policy.engine
    if name not in ENGINES:
        raise ConfigError(unknown("policy.engine", name, ["auto", *ENGINES]))
    if not any(name in mode.engines for mode in MODES.values()):
        raise ConfigError(f"policy.engine: {name!r} cannot be given new weights, so it cannot sample a training run.")
    if (name == "server") != bool(policy.servers):
        raise ConfigError(f"policy.servers: got {list(policy.servers)} with engine {name!r}; 'server' needs addresses.")
    return name


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
    if wanted not in MODES:
        raise ConfigError(unknown("policy.sync", wanted, ["auto", *MODES]))
    if wanted not in fitting:
        kind = "" if config.lora is None or config.lora.served_apart else f"{config.lora.kind!r} "
        which = (
            f"engine {engine!r} {'with' if adapters else 'without'} {kind}adapters" + sharded * " and a split learner"
        )
        raise ConfigError(f"policy.sync: {wanted!r} does not work with {which}; valid: auto, {', '.join(fitting)}.")
    return [wanted]


def engine_options(config: TrainConfig, mode: str) -> dict[str, Any]:
    """The engine's keyword arguments for a run that uses `mode`."""
    engine, policy = engine_of(config), config.policy
    if engine == "transformers":
        return {"max_rows": policy.max_rows}
    if engine == "server":
        return {"servers": list(policy.servers), **policy.server}
    options: dict[str, Any] = {"dtype": config.optimizer.dtype, **policy.vllm}
    if config.lora is not None and mode == "adapter":
        options["lora_rank"] = config.lora.rank
    if policy.sleep:
        options["enable_sleep_mode"] = True
    return options


def check(config: TrainConfig, world: World | None = None) -> None:
    """Looks at everything in `policy`, before a model is loaded; `world`: the processes that train together.

    Raises:
        SettingError: an engine, a mode or an engine argument that cannot work in this run.
    """
    engine, world = engine_of(config), world or World()
    modes_of(config, engine, sharded=world.sharded)
    for name, owner in (("vllm", "vllm"), ("server", "server")):
        if (given := getattr(config.policy, name)) and engine != owner:
            raise ConfigError(f"policy.{name}: got {dict(given)}, but engine {engine!r} takes none of it.")
    if config.policy.sleep and not (engine == "vllm" and torch.cuda.is_available()):
        raise ConfigError("policy.sleep: only vLLM on a CUDA device can give its memory back while the learner trains.")
    if engine == "vllm":
        from llm_gym.policies.vllm.policy import check as check_arguments

        check_arguments(config.policy.vllm, ranks=world.size)
    if engine == "server":
        from llm_gym.policies.vllm_server.policy import ServerPolicy, addresses

        addresses(config.policy.servers)
        known = inspect.signature(ServerPolicy).parameters.keys() - {"model", "servers", "version", "on_wait", "ranks"}
        for name in config.policy.server.keys() - known:
            raise ConfigError(unknown("policy.server option", name, known))


class Sync:
    """The sampler of a run, and how it is brought up to date; every process of the run has one, and calls it.

    Each has an engine of its own, and proves it; servers are shared, and get their weights from rank 0.

    Args:
        config: the run's; `check` has accepted it.
        learner: whose weights are served, from now on.
        folder: where a checkpoint is written for an engine that reads one, and deleted again.
        version: of the weights now.
        tell: is told, in a line, what was decided by measurement.

    Raises:
        SyncError: engine and learner disagree from the start.
        RankError: another process of the run is gone.
    """

    policy: Any
    mode: str

    def __init__(
        self, config: TrainConfig, learner: Learner, *, folder: Path, version: int, tell: Callable[[str], None]
    ) -> None:
        self.config, self.learner, self.world, self.tell = config, learner, learner.world, tell
        self.folder = folder.with_name(f"{folder.name}-{self.world.rank}") if self.world.rank else folder
        modes = modes_of(config, engine_of(config), sharded=learner.world.sharded)
        if config.policy.sync == "auto" and config.lora is not None and not apart(learner.model):
            modes = [mode for mode in modes if not MODES[mode].over_base]
        if untied(learner.model):
            served = UNTIED if engine_of(config) == "server" else "engines and exports hold both"
            tell(f"lora: embedding and head, one matrix in the model, become two; {served}.")
        try:
            try:
                self._begin(modes, version, tell)
            except (SyncError, PolicyError) as error:
                able = self.world.size == 1 and MODES["restart"].fits(config, engine_of(config), sharded=False)
                if config.policy.sync != "auto" or not able:
                    raise
                tell(f"policy.sync: 'restart', because an engine that is sent weights goes wrong here: {error}")
                self._start("restart", version)
        except BaseException:
            if hasattr(self, "policy"):
                self.policy.close()
            raise

    def __call__(self, version: int) -> dict[str, Any]:
        """Sends the learner's weights to the engine as `version`, and proves that they arrived; returns metrics.

        Raises:
            SyncError: they did not.
            RankError: another process of the run is gone.
        """
        times: dict[str, float] = {}
        sent: dict[str, int] = {}
        with self.world.blame_lost_rank("sync"):
            self._push(version, sent)
            with clock(times, "time/proof"):
                found = self.proof(sent, version=version, how=f"sync {self.mode!r} after step {version}")
        canaries = {"sync/canary_gap_max": found.worst, "sync/canary_share": found.share}
        return {"sync/mode": self.mode, **canaries, **times}

    @contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """While the learner trains: the engine's memory is free, if the run wants that.

        It wakes before anything is written to it: weights written to a sleeping engine are lost.
        """
        if not self.config.policy.sleep:
            yield
            return
        self.policy.sleep()
        try:
            yield
        finally:
            self.policy.wake()

    def close(self) -> None:
        """Ends the engine."""
        self.policy.close()

    def _begin(self, modes: Sequence[str], version: int, tell: Callable[[str], None]) -> None:
        """An engine for the best of the modes."""
        best = modes[0]
        if len(modes) > 1:
            best, said = self._fastest(modes, version)
            tell(said)
        elif best == "merged" and self.config.policy.sync == "auto":
            tell("policy.sync: 'merged', because vLLM cannot hold this adapter apart from the weights.")
        self._start(best, version)

    @property
    def _sends(self) -> bool:
        """Whether weights go out from this process: to its own engine, or from the first one to the servers."""
        return self.world.rank == 0 or engine_of(self.config) != "server"

    def _push(self, version: int, sent: dict[str, int]) -> None:
        """Sends the weights; `sent` gets the checksums of what the engine should hold, if they go out from here."""
        flows: list[Tensors] = []

        def seen(tensors: Tensors) -> Tensors:
            flows.append(recorded(tensors, self.dtype, sent) if self._sends else tensors)
            return flows[-1]

        if self.learner.device.type == "cuda":
            torch.cuda.synchronize()  # the engine's thread may read the weights on another stream
        MODES[self.mode].push(self.learner.model, self.policy, version, self.folder, seen)
        for flow in flows:
            deque(flow, maxlen=0)  # what an engine did not take, it should hold nevertheless

    def _start(self, mode: str, version: int) -> None:
        """An engine for `mode`, in place of any other, with the learner's weights."""
        if getattr(self, "mode", None) == mode:
            return
        if hasattr(self, "policy"):
            self.policy.close()
        config, model = self.config, self.learner.model
        engine = engine_of(config)
        source: Any = config.model
        if engine == "transformers":
            source = model if mode == "shared" else prepare(merged(model), device=self.learner.device)
        shared = {"ranks": self.world, "on_wait": self.tell} if engine == "server" else {}
        options = engine_options(config, mode) | shared
        # An engine reads from its folder whether embedding and head are one.
        other = engine == "vllm" and untied(model) and not MODES[mode].over_base

        def begin() -> None:
            with _written(model, self.folder) if other else nullcontext():
                where = self.folder if other else source
                self.policy = make_policy(where, engine=engine, version=version, **options)

        self.world.on_all_ranks(begin, "starting the engine")
        self.mode = mode
        self.dtype = self.policy.dtype
        self.proof = self._proof()
        if MODES[mode].over_base:
            self.policy.load(as_saved(model, plain_tensors(model, adapters=False)), version=version)
        self(version)

    def _proof(self) -> WeightSyncCheck:
        """What compares this engine with the learner."""
        config, vocabulary = self.config, self.learner.backbone.config.vocab_size
        lora, quantised = config.lora, bool(config.policy.vllm.get("quantization"))
        base = torch.float32 if lora is None or lora.base == "float32" else torch.bfloat16
        coarse = max(self.dtype, base, key=lambda dtype: torch.finfo(dtype).eps)
        exact = coarse == torch.float32 and not quantised
        own = engine_of(config) != "transformers" and self.dtype != torch.float32
        alike = not self.world.sharded and (lora is None or MODES[self.mode].over_base)
        canaries = ProbePrompts.of(vocabulary, self.policy.max_context, config.sampling.temperature, exact=exact)
        return WeightSyncCheck(
            self.learner,
            self.policy,
            canaries,
            coarse=None if exact else coarse,
            held=self.dtype if own and alike else torch.float32,
            blurred=own and not alike,
            quantised=quantised,
            limit=config.policy.canary_limit,
        )

    def _fastest(self, modes: Sequence[str], version: int) -> tuple[str, str]:
        """The mode with the least estimated time for a step's synchronisation and sampling, and a line about it."""
        seconds = {}
        for mode in modes:
            try:
                self._start(mode, version)
                seconds[mode] = max(self.world.gather(self._seconds(version), "measuring"))
            except PolicyError:  # a server that was started without adapters
                if mode == modes[-1]:
                    raise
        best = min(seconds, key=lambda mode: seconds[mode])
        each = ", ".join(f"{mode} {value:.2f} s" for mode, value in seconds.items())
        return best, f"policy.sync: {best!r} is the fastest here; estimated sync and sampling per step: {each}."

    def _seconds(self, version: int) -> float:
        """Estimated seconds of synchronisation and sampling in one step of the run."""
        rows = -(-self.config.prompts_per_step * self.config.group_size // self.world.size)
        ids = np.random.default_rng(1).integers(0, self.learner.backbone.config.vocab_size, (min(rows, BURST), CONTEXT))
        sampling = Sampling(self.config.sampling.temperature, max_tokens=TOKENS, stop_token_ids=())
        times: dict[str, float] = {}
        for _ in range(2):  # the first time, kernels are compiled
            times.clear()
            with clock(times, "sync"):
                self(version)
            with clock(times, "burst"):
                made = self.policy.generate(list(ids.astype(np.int32)), sampling)
        tokens = rows * self.config.sampling.max_tokens / 2  # on average, as far as anybody can know
        return times["sync"] + times["burst"] * tokens / sum(len(c.tokens) for c in made)
