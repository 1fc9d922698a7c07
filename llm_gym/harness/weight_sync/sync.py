"""The sampler of a training run, and how the learner's weights reach it: sent by a transport, and proven."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_gym.core import Sampling
from llm_gym.errors import PolicyError, SyncError
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import merged, plain_tensors, prepare
from llm_gym.harness.runs.metrics import clock
from llm_gym.harness.weight_sync.engines import engine_of, engine_options, receiver_of
from llm_gym.harness.weight_sync.transports import Tensors, mode_of, modes_of, written
from llm_gym.harness.weight_sync.verify import ProbePrompts, WeightSyncCheck
from llm_gym.models.checksums import recorded
from llm_gym.models.folding import apart, untied
from llm_gym.models.plain import as_saved
from llm_gym.policies import make_policy

BURST, CONTEXT, TOKENS = 64, 32, 32
"""What is sampled to measure a mode: at most so many rows, their length, new tokens of each."""


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

    policy: Any = None
    """The engine, a `policies.WeightReceiver`."""
    mode: str = ""

    def __init__(
        self, config: TrainConfig, learner: Learner, *, folder: Path, version: int, tell: Callable[[str], None]
    ) -> None:
        self.config, self.learner, self.world, self.tell = config, learner, learner.world, tell
        self.engine, self.receiver = engine_of(config), receiver_of(config)
        self.folder = folder.with_name(f"{folder.name}-{self.world.rank}") if self.world.rank else folder
        modes = modes_of(config, self.engine, sharded=learner.world.sharded)
        if config.policy.sync == "auto" and config.lora is not None and not apart(learner.model):
            modes = [mode for mode in modes if not mode_of(mode).over_base]
        if untied(learner.model):
            tell(f"lora: embedding and head, one matrix in the model, become two; {self.receiver.untied}.")
        try:
            try:
                self._begin(modes, version, tell)
            except (SyncError, PolicyError) as error:
                able = self.world.size == 1 and mode_of("restart").fits(config, self.engine, sharded=False)
                if config.policy.sync != "auto" or not able:
                    raise
                tell(f"policy.sync: 'restart', because an engine that is sent weights goes wrong here: {error}")
                self._start("restart", version)
        except BaseException:
            if self.policy is not None:
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
        took = {f"sync/{name}": seconds for name, seconds in self.policy.update_seconds.items()}
        return {"sync/mode": self.mode, **took, **canaries, **times}

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
        elif self.config.policy.sync == "auto" and mode_of(best).adapters and not mode_of(best).over_base:
            tell(f"policy.sync: {best!r}, because {self.engine} cannot hold this adapter apart from the weights.")
        self._start(best, version)

    @property
    def _sends(self) -> bool:
        """Whether weights go out from this process: to its own engine, or from the first one to the servers."""
        return self.world.rank == 0 or not self.receiver.shared

    def _push(self, version: int, sent: dict[str, int]) -> None:
        """Sends the weights; `sent` gets the checksums of what the engine should hold, if they go out from here."""
        flows: list[Tensors] = []

        def seen(tensors: Tensors) -> Tensors:
            flows.append(recorded(tensors, self.dtype, sent) if self._sends else tensors)
            return flows[-1]

        if self.learner.device.type == "cuda":
            torch.cuda.synchronize()  # the engine's thread may read the weights on another stream
        mode_of(self.mode).push(self.learner.model, self.policy, version, self.folder, seen)
        for flow in flows:
            deque(flow, maxlen=0)  # what an engine did not take, it should hold nevertheless

    def _start(self, mode: str, version: int) -> None:
        """An engine for `mode`, in place of any other, with the learner's weights."""
        if self.mode == mode:
            return
        if self.policy is not None:
            self.policy.close()
        config, model = self.config, self.learner.model
        source: Any = config.model
        if self.receiver.module:
            source = model if mode_of(mode).in_place else prepare(merged(model), device=self.learner.device)
        shared = {"ranks": self.world, "on_wait": self.tell} if self.receiver.shared else {}
        options = engine_options(config, mode) | shared
        other = self.receiver.ties_by_folder and untied(model) and not mode_of(mode).over_base

        def begin() -> None:
            with written(model, self.folder) if other else nullcontext():
                where = self.folder if other else source
                self.policy = make_policy(where, engine=self.receiver.maker or self.engine, version=version, **options)

        self.world.on_all_ranks(begin, "starting the engine")
        self.mode = mode
        self.dtype = self.policy.dtype
        self.proof = self._proof()
        if mode_of(mode).over_base:
            self.policy.load(as_saved(model, plain_tensors(model, adapters=False)), version=version)
        self(version)

    def _proof(self) -> WeightSyncCheck:
        """What compares this engine with the learner."""
        config, vocabulary = self.config, self.learner.backbone.config.vocab_size
        lora, quantised = config.lora, bool(config.policy.vllm.get("quantization"))
        base = torch.float32 if lora is None or lora.base == "float32" else torch.bfloat16
        coarse = max(self.dtype, base, key=lambda dtype: torch.finfo(dtype).eps)
        exact = coarse == torch.float32 and not quantised
        own = not self.receiver.module and self.dtype != torch.float32
        alike = not self.world.sharded and (lora is None or mode_of(self.mode).over_base)
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
