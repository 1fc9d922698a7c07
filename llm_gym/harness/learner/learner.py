"""The learner: log-probabilities, backward, clip, step. One device; it is given ready-made batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.importance_sampling import importance_weights
from llm_gym.harness.algorithms.kl import k3, kl_loss, kl_suffix_sum
from llm_gym.harness.algorithms.losses import LossConfig, loss_function
from llm_gym.harness.algorithms.streams import Streams
from llm_gym.harness.batching.shards import dummy_batches
from llm_gym.harness.distributed.fsdp import gathered, is_sharded, shard
from llm_gym.harness.distributed.world import World
from llm_gym.harness.learner import weights
from llm_gym.harness.learner.memory_probe import all_or_nothing
from llm_gym.harness.learner.optimizers import DTYPES, OptimizerConfig, clip_gradients, lr_factor, make_optimizers
from llm_gym.harness.model.heads import token_logprobs, token_loss
from llm_gym.harness.model.loading import Backbone
from llm_gym.harness.model.rounding import held_as
from llm_gym.harness.types import Batch, MicroBatch, TokenStreams

T = TypeVar("T")


MEANS = ("policy/entropy", "policy/ratio_mean", "policy/clip_fraction", "sampler/logprob_gap_mean")
"""Metrics of every step; NaN for a step without a token to compute."""
SEEN = "tokens computed"
"""Key of how many tokens the metrics' sums are over, while ranks add them up."""


class Learner:
    """A model, its optimizer, and the step that joins them.

    The model stays in eval mode: dropout would make old and new log-probabilities two functions. Its verbs make a loop
    of one's own: `forward_backward`, `optim_step` (both: `step`), `save` and `load`.

    >>> import numpy as np
    >>> from llm_gym.harness.batching import pack
    >>> from llm_gym.harness.model import load_model
    >>> from llm_gym.harness.types import TrainSequence
    >>> learner = Learner(load_model(), OptimizerConfig(lr=1e-4), LossConfig(name="reinforce"), total_steps=2)
    >>> said = {"old_logprobs": np.full(2, -1.0), "advantages": np.ones(2)}
    >>> batch = pack([TrainSequence(np.array([1, 5, 6, 7], np.int32), np.array([2, 3]), said)], max_tokens=64)
    >>> found = learner.forward_backward(batch)
    >>> found["tokens/trained"], learner.optim_step()["policy/grad_norm"] > 0
    (2.0, True)
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     learner.save(pathlib.Path(folder))
    ...     learner.load(pathlib.Path(folder))
    >>> learner.step_count
    1

    Args:
        model: from `load_model`; trained in place.
        optimizer: how a gradient becomes a step.
        loss: what one token contributes.
        total_steps: optimizer steps of the whole run, for the schedule.
        world: the processes that train together; each is given its share of a batch (see `batching.shards`).

    Raises:
        ConfigError: a setting that cannot work, or a model whose log-probabilities cannot be computed.
    """

    def __init__(
        self,
        model: Any,
        optimizer: OptimizerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        total_steps: int = 1,
        world: World | None = None,
    ) -> None:
        self.model, self.world = model.eval(), world or World()
        self.settings, self.loss = optimizer or OptimizerConfig(), loss or LossConfig()
        self.total_steps, self.dtype = total_steps, DTYPES[self.settings.dtype]
        self.loss_fn, self.one_pass = loss_function(self.loss.name), self.loss.token_level
        self.step_count = 0
        self._pending = 0  # tokens whose gradient waits for `optim_step`
        self.backbone = Backbone(model)
        self.reference = self._reference() if self.loss.uses_reference else None
        if self.world.sharded:
            self._shard()
        self.optimizers = make_optimizers(model, self.settings)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def logprobs(
        self,
        batch: MicroBatch,
        *,
        temperature: float = 1.0,
        grad: bool = False,
        entropy: bool = True,
        held: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of each trained token at `temperature`, float32 [M] each.

        `held`: compute in float32, with weights that are rounded to this type; None: compute as in training.
        """
        with torch.set_grad_enabled(grad):
            head = partial(token_logprobs, entropy=entropy)
            return self._through(self.backbone, batch.to(self.device), temperature, head, held)

    def step(self, batch: Batch, *, temperature: float = 1.0) -> dict[str, float]:
        """One optimizer step on a whole batch; returns its metrics: `forward_backward`, then `optim_step`."""
        return {**self.forward_backward(batch, temperature=temperature), **self.optim_step()}

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Writes what training needs to go on bit for bit: a Hugging Face folder, and beside it the optimizer's state.

        Every rank calls it with the same folder. `tokenizer`: one, a folder or a hub id, saved with the
        weights; None: the embedded model's.
        """
        weights.save(self, tokenizer, folder)

    def load(self, folder: Path) -> None:
        """Goes on where `save` was called, with as many ranks as there are now; rates and betas stay as set here.

        Raises:
            CheckpointError: a file is missing, or of another model.
        """
        weights.restore(self, folder)

    def forward_backward(self, batch: Batch, *, temperature: float = 1.0) -> dict[str, float]:
        """Adds the gradient of a whole batch, micro-batch by micro-batch, to what is there; returns its metrics.

        Means are over the tokens that were computed.

        Args:
            batch: from `batching.pack`.
            temperature: the sampler's: log-probabilities are of the distribution that was sampled from.

        Raises:
            ShortOfMemory: a micro-batch does not fit; nothing has changed (see `token_budget`).
        """
        totals: dict[str, float] = {}
        peak_gap, idle = 0.0, dummy_batches(self.world, len(batch.micro))
        with all_or_nothing(self.model):
            for micro in batch.micro:
                sums = self.backward(micro.to(self.device), temperature)
                peak_gap = max(peak_gap, sums.pop("sampler/logprob_gap_max"))
                totals = {name: totals.get(name, 0.0) + number for name, number in sums.items()}
            for micro in idle:
                self.backward(micro.to(self.device), temperature)
        mine = totals | {SEEN: sum(micro.trained for micro in batch.micro)}
        totals = self.world.add(mine, "adding metrics")
        totals = totals if totals[SEEN] else totals | dict.fromkeys(MEANS, 0.0)
        peak_gap = max(self.world.gather(peak_gap, "adding metrics"))
        loss, seen = totals.pop("policy/loss", 0.0), totals.pop(SEEN)
        self._pending += int(seen)
        return {
            "policy/loss": loss,
            **{name: total / seen if seen else math.nan for name, total in totals.items()},
            "sampler/logprob_gap_max": peak_gap if seen else math.nan,
            "tokens/trained": float(batch.tokens),
        }

    def optim_step(self) -> dict[str, float]:
        """Clips, steps and clears; returns the gradient's norm before clipping, and the learning rate.

        The schedule moves on even if no token was computed (every group without spread): it is a step of the run;
        weights and momenta then stay as they are.
        """
        rate = self._rate()
        norm = self._apply(rate) if self._pending else 0.0
        self._pending = 0
        self.step_count += 1
        return {"policy/grad_norm": norm, "policy/lr": self.settings.peak * rate}

    def compute_proximal_logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Batch:
        """The batch with this model's log-probabilities as its proximal ones; before the first of several updates."""
        idle = dummy_batches(self.world, len(batch.micro))
        known = [self.logprobs(m, temperature=temperature, entropy=False)[0].cpu() for m in (*batch.micro, *idle)]
        known = known[: len(batch.micro)]
        return replace(batch, micro=tuple(m.having(proximal=p) for m, p in zip(batch.micro, known, strict=True)))

    def dry_run(self, batch: MicroBatch) -> None:
        """Forward and backward of a micro-batch that stands for others; its gradient is added to what is there."""
        self.backward(batch, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer states and the step count; the weights are the model's own."""
        return {"step": self.step_count, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit for bit (given the same weights)."""
        self.step_count = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    # Inside

    def _through(
        self,
        body: Backbone,
        batch: MicroBatch,
        temperature: float,
        head: Callable[..., T],
        held: torch.dtype | None = None,
    ) -> T:
        """What `head` (a function of `heads`) makes of the body's hidden states."""
        return gathered(body.causal, lambda: head(**self._hidden(body, batch, temperature, held)))

    def _hidden(
        self, body: Backbone, batch: MicroBatch, temperature: float, held: torch.dtype | None = None
    ) -> dict[str, Any]:
        half = held is None and self.dtype != torch.float32
        rounded = nullcontext() if held is None or held == torch.float32 else held_as(body.causal, held)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=half), rounded:
            hidden = body.hidden(batch).index_select(0, batch.streams["source"])
            weight, bias = body.head()
        weight = weight if held is None else weight.to(held)
        cap = None if body.softcap is None else body.softcap / body.scale
        scaled = {"bias": bias, "temperature": temperature / body.scale, "softcap": cap}
        return {"hidden": hidden, "weight": weight, "targets": batch.streams["target"], **scaled}

    def backward(self, batch: MicroBatch, temperature: float) -> dict[str, float]:
        """Adds one micro-batch's gradient; returns its share of the step's loss, and sums over its tokens, by name."""
        reference = self.reference_logprobs(batch, temperature)
        sums = {"sampler/logprob_gap_max": torch.zeros(1, device=self.device)}

        def per_token(rows: slice, new: Tensor, entropy: Tensor) -> Tensor:
            part = batch.streams.at(rows)
            losses, streams = self.losses(part, new, entropy, None if reference is None else reference[rows])
            gaps = [sums["sampler/logprob_gap_max"], streams["sampler/logprob_gap_mean"]]
            sums["sampler/logprob_gap_max"] = torch.cat(gaps).amax(0, keepdim=True)
            sums.update({name: sums.get(name, 0.0) + stream.sum() for name, stream in streams.items()})
            return part["weight"] * losses

        def in_two_passes(**hidden: Any) -> Tensor:
            return per_token(slice(None), *token_logprobs(**hidden)).sum()

        in_one = partial(token_loss, per_token=per_token, entropy_gradient=self.loss.entropy_weight != 0)
        loss = self._through(self.backbone, batch, temperature, in_one if self.one_pass else in_two_passes)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"policy/loss": float(loss.detach()), **{name: float(total) for name, total in sums.items()}}

    def losses(
        self, known: TokenStreams, new: Tensor, entropy: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token, [M], and streams [M] to average; M may be some of a micro-batch's tokens."""
        config = self.loss
        sampler, credit = known["old_logprobs"].to(new.dtype), self._credit(known).to(new.dtype)
        old, correction, streams = self.anchor(known, new, sampler)
        streams |= {"policy/entropy": entropy.detach(), "sampler/logprob_gap_mean": (new.detach() - sampler).abs()}
        pull = torch.zeros_like(new)
        if reference is not None:
            streams["policy/kl"] = k3(new.detach(), reference)  # reported so whatever is trained: never negative
            if config.kl_in == "reward":
                credit = credit - config.kl_weight * kl_suffix_sum(new, reference, known["sequence"])
            else:
                pull = config.kl_weight * kl_loss(new, old, reference, kind=config.kl)
        per_token, found = self.loss_fn(Streams(new, old, credit, known["sequence"], entropy.detach()), config)
        streams |= found
        per_token = correction * (per_token + pull)
        if config.entropy_weight:
            per_token = per_token - config.entropy_weight * entropy
        return per_token, streams

    def _credit(self, known: TokenStreams) -> Tensor:
        """What each token is credited with, [M]."""
        return known["advantages"]

    def anchor(self, known: TokenStreams, new: Tensor, sampler: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the ratio is taken against, each token's importance weight, and their metrics."""
        if self.loss.correction.name == "none":
            return sampler, torch.ones_like(new), {}
        proximal = known["proximal"].to(new.dtype) if "proximal" in known else new.detach()
        return proximal, *importance_weights(proximal, sampler, known["sequence"], self.loss.correction)

    def _reference(self) -> Backbone:
        """The frozen start: the base model under the adapters, or a copy."""
        if hasattr(self.model, "peft_config"):
            return self.backbone
        return Backbone(copy.deepcopy(self.model).requires_grad_(False))

    def _shard(self) -> None:
        """Splits the model, and a reference of its own, over the ranks.

        Raises:
            ConfigError: ranks would run the model differently often, and wait for each other.
        """
        if self.backbone.together < math.inf or self.backbone.from_head:
            raise ConfigError(
                f"parallel.strategy: got 'fsdp', but rows of {type(self.backbone.causal).__name__} cannot all share a "
                "forward, so ranks would run it differently often; pass 'ddp'."
            )
        for body in (self.backbone, self.reference):
            if body is not None and not is_sharded(body.causal):
                shard(body.causal, self.world.device, self.world.size)

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor | None:
        """Log-probabilities of the trained tokens, [M], under the model that it is held to; None without one."""
        if self.reference is None:
            return None
        with self.reference.without_adapters():
            head = partial(token_logprobs, entropy=False)
            return self._through(self.reference, batch, temperature, head)[0]

    def _rate(self) -> float:
        return lr_factor(self.step_count, self.total_steps, self.settings)

    def _apply(self, rate: float) -> float:
        """Clips, steps and clears; returns the gradient norm before clipping."""
        self.world.sum_gradients(self.model.parameters())
        norm = clip_gradients(self.model.parameters(), self.settings.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm
