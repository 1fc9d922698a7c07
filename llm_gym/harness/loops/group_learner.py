"""What learns: groups of episodes become optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llm_gym.core import Group
from llm_gym.harness.algorithms.rewards import rewards_of
from llm_gym.harness.batching.packing import samples
from llm_gym.harness.batching.shards import pack_shard
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.mixture import scoring
from llm_gym.harness.distributed.world import World
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.token_budget import Budget
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.preparation import Prepared
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.randomness import reseed
from llm_gym.harness.runs.metrics import combine
from llm_gym.harness.types import Batch, Floats
from llm_gym.models.loading import set_threads
from llm_gym.tokenizer import load_tokenizer


class GroupLearner:
    """Loads the model of a run, and trains it on groups: rewards -> advantages -> packed batches -> optimizer steps.

    Args:
        config: the run's.
        prepared: its environments and functions.
        world: the ranks that train together.
        observer: is told of the phases `load` and `train`.
        checkpoint: what to go on from; None: the untrained model.
    """

    budget: Budget
    """How many tokens a micro-batch may have; there once `measure` was called."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        world: World,
        observer: Observer,
        checkpoint: Path | None = None,
    ) -> None:
        self.config, self.world, self.observer = config, world, observer
        self.env_specs, self.compute_advantages = prepared.env_specs, prepared.compute_advantages
        observer.on_phase("load", 1)
        torch.manual_seed(config.seed)  # new adapters are drawn
        device = "cpu" if world.sharded else world.device  # parts go where they belong when it is split
        self.model = load_model(config.model, device=device, lora=config.lora, memory=config.memory)
        set_threads(self.model, config.threads)
        self.learner = self.make_learner()
        if checkpoint is not None:
            self.learner.load(checkpoint)

    def make_learner(self) -> Learner:
        """What turns batches into steps of `self.model`."""
        config = self.config
        return Learner(self.model, config.optimizer, config.loss, total_steps=config.updates, world=self.world)

    def measure(self) -> int:
        """Fixes the token budget of a micro-batch by the memory that is free now, unless the settings say it."""
        self.budget = Budget(self.config.token_budget, self.learner, self.observer.on_note)
        return self.budget.tokens

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """The optimizer steps of a rollout, `epochs` times over its `minibatches`.

        The old log-probabilities stay the sampler's throughout.

        Args:
            groups: of all ranks, as `distributed.groups` gives them.
            step: steps done before; where the run's random streams are.
        """
        config, temperature = self.config, self.config.sampling.temperature
        updates = config.minibatches * config.epochs
        reseed(config.seed, step)  # whatever the environments drew
        self.observer.on_phase("train", updates)
        batches = self.batches(groups)
        if updates > 1 and config.loss.correction.name != "none":
            batches = [self.learner.compute_proximal_logprobs(batch, temperature=temperature) for batch in batches]
        rows = []
        for batch in batches * config.epochs:
            rows.append(self.budget.step(batch, temperature=temperature))
            self.observer.on_progress(len(rows))
        return combine(rows)

    def batches(self, groups: Sequence[Group]) -> list[Batch]:
        """The groups, their advantages computed together, as one packed batch for each of the run's `minibatches`."""
        advantages: Floats = np.zeros((0, self.config.group_size))
        if groups:
            rewards = rewards_of(groups, **scoring(self.env_specs, groups), overlong=self.config.overlong)
            advantages = self.compute_advantages(rewards)
        n = self.config.minibatches
        return [self.pack(groups[i::n], advantages[i::n]) for i in range(n)]

    def pack(self, groups: Sequence[Group], advantages: Floats | None = None) -> Batch:
        """Groups as packed micro-batches of this rank."""
        loss = self.config.loss
        return pack_shard(
            self.world,
            samples(groups, advantages, train_truncated=self.config.truncated == "train"),
            max_tokens=self.budget.tokens,
            normaliser=loss.normaliser,
            constant_length=loss.constant_length,
            skip_zero=advantages is not None and not loss.needs_every_sequence,
            share=self.learner.backbone.shares,
        )

    def save(self, folder: Path) -> None:
        """Writes weights, tokenizer and the optimizer's state; every rank calls it."""
        self.learner.save(folder, load_tokenizer(self.config.model, self.config.chat_template))

    def close(self) -> None:
        """Frees what it holds beside the model: nothing here; a teacher, in distillation."""
