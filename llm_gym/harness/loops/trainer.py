"""The training loop, readable as a list of verbs: draw, roll out, compute advantages, pack, step, sync, write."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_gym.core import Episode, Group, Sampling, group
from llm_gym.errors import CheckpointError, TrainingError
from llm_gym.harness.algorithms.rewards import RewardWatch, rewards_of
from llm_gym.harness.batching.packing import samples
from llm_gym.harness.batching.shards import pack_shard
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.filters import StepBatch
from llm_gym.harness.data.mixture import Drivers, describe_each, scoring
from llm_gym.harness.data.tasks import Task
from llm_gym.harness.distributed.world import connect
from llm_gym.harness.evaluation.evaluator import Evaluation
from llm_gym.harness.evaluation.kl_from_start import kl_from_start
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.token_budget import Budget
from llm_gym.harness.learner.weights import restore, save
from llm_gym.harness.loops.environments import best_metric, eval_reward
from llm_gym.harness.loops.observer import Observer as Observer
from llm_gym.harness.loops.observer import listening
from llm_gym.harness.loops.preparation import prepare_run
from llm_gym.harness.loops.resuming import open_run
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.randomness import reseed
from llm_gym.harness.runs import loggers, provenance
from llm_gym.harness.runs.metrics import clock, combine, describe, speeds, staleness
from llm_gym.harness.runs.run_folder import NonZeroRankRunFolder, RunFolder
from llm_gym.harness.runs.verdict import MOVED, alarms
from llm_gym.harness.settings import dump, to_dict
from llm_gym.harness.types import Batch, Floats
from llm_gym.harness.weight_sync.sync import Sync
from llm_gym.models.loading import set_threads
from llm_gym.rollouts.driver import Driver, OnEpisode
from llm_gym.tokenizer import load_tokenizer


class Trainer:
    """Trains a policy on an environment.

    Args:
        config: every decision of the run.
        out: the run folder; None: `runs/<env>-<time>`.
        resume: go on from the folder's newest checkpoint, or from the start if there is none yet.
        observer: is told what happens; any object with some of the methods of `Observer`.
        play: whether to start the engine and the environments; without them it can only `learn` (see `replay`).
        learns: whether it will train; without it settings that teach nothing are accepted.

    Raises:
        SettingError: something that cannot work, before the model is loaded.
        CheckpointError: the folder already holds a run, and `resume` is not set.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        observer: object | None = None,
        play: bool = True,
        learns: bool = True,
    ) -> None:
        self.config = config = config.resolved()
        self.world = connect(config.parallel, device_of(config.device))
        self.observer = listening(observer if self.world.rank == 0 else None)
        ready = prepare_run(config, self.world, learns=learns)
        self.env_specs, self.selection = ready.env_specs, ready.selection
        self.compute_advantages = ready.compute_advantages
        self.rewards = RewardWatch(min(2, config.prompts_per_step))
        path = self.world.on_rank0(lambda: out or default_folder(self.env_specs[0].env_id), "naming the run folder")
        self.run = RunFolder(path) if self.world.rank == 0 else NonZeroRankRunFolder(path)
        begin = partial(open_run, self.run, config, resume=resume, steps=config.steps)
        opened = self.world.on_rank0(begin, "opening the run folder")
        self.config = config = opened.config
        self.step = opened.step
        if opened.checkpoint is not None:
            self.selection.restore(opened.checkpoint)
        self.alarmed = set[str]()  # what a person was warned of
        self.observer.on_start(config, self.run.path, self.step)
        self.run.add_provenance(provenance.describe(self.env_specs[0].env_id, self.step, self.world.size))
        tell = self.observer.on_note
        if opened.note:
            tell(opened.note)
        self.loggers = loggers.Loggers(tell)
        start = partial(self.loggers.start, config.log, self.run.path, to_dict(config), self.step)
        self.world.on_rank0(start, "starting the loggers")
        self.observer.on_phase("load", 1)
        torch.manual_seed(config.seed)  # new adapters are drawn
        device = "cpu" if self.world.sharded else self.world.device  # parts go where they belong when it is split
        self.model = load_model(config.model, device=device, lora=config.lora, memory=config.memory)
        set_threads(self.model, config.threads)
        self.learner = self.make_learner()
        if opened.checkpoint is not None:
            restore(self.learner, opened.checkpoint)
        if not play:
            self.budget = Budget(config.token_budget, self.learner, tell)
            return
        self.observer.on_phase("engine", 1)
        self.sync = Sync(config, self.learner, folder=self.run.path / "sync", version=self.step, tell=tell)
        self.policy = self.sync.policy
        with self.sync.engine_asleep():
            self.budget = Budget(config.token_budget, self.learner, tell)
        self.config = replace(config, token_budget=self.budget.tokens)  # resumed, the run packs its rows alike
        self.run.write_config(dump(self.config))
        self.drivers = Drivers(self.env_specs, self.policy, time_limit=config.time_limit)
        most = config.sampling.max_tokens
        tasks, limit = ready.eval_tasks, config.time_limit
        self.evaluation = Evaluation(tasks, self.policy, config.eval, max_tokens=most, time_limit=limit)

    def make_learner(self) -> Learner:
        """What turns batches into steps of `self.model`."""
        config = self.config
        return Learner(self.model, config.optimizer, config.loss, total_steps=config.updates, world=self.world)

    def train(self, *, rollout_only: bool = False) -> list[dict[str, Any]]:
        """Runs the remaining steps; returns every row of metrics.

        With `rollout_only` it plays and writes each step's episodes, and neither trains nor evaluates.
        """
        step = self.rollout_step if rollout_only else self.train_step
        try:
            if self.step == 0 and not rollout_only:
                self._write({"step": 0, **self.evaluate()})
            while self.step < self.config.steps:
                step()
        finally:
            self.close()
        rows = self.run.metrics()
        self.observer.on_end(rows)
        return rows

    def rollout_step(self) -> None:
        """One step's episodes and their row of metrics; the weights stay as they are."""
        times: dict[str, float] = {}
        reseed(self.config.seed, self.step)
        with clock(times, "time/rollout"):
            batch = self.collect()
        self.step += 1
        self.run.write_episodes(f"step_{self.step:06d}", batch.episodes)
        self._write({"step": self.step, **describe(batch.played), **batch.metrics, **times})

    def train_step(self) -> dict[str, Any]:
        """One step, from seeds to a row of metrics."""
        times: dict[str, float] = {}
        reseed(self.config.seed, self.step)
        with clock(times, "time/step"):
            with clock(times, "time/rollout"):
                batch = self.collect()
            with clock(times, "time/train"), self.sync.engine_asleep(), self.world.blame_lost_rank("training"):
                learned = self.learn(batch.episodes) | self.moved()
            with clock(times, "time/sync"):
                self.observer.on_phase("sync", 1)
                synced = self.world.reduce_max(self.sync(self.step + 1), "sync")
        told = describe(batch.played) | describe_each(self.env_specs, batch.played) | batch.metrics
        told |= {"sampler/staleness_max": staleness(batch.episodes, self.step)}
        self.step += 1
        times = self.world.reduce_max(times, "a step")
        row = {"step": self.step, **told, **learned, **synced, **times}
        row |= speeds(learned, told["tokens/generated"], times)
        if self._due(self.config.eval.every):
            row |= self.evaluate()
        self.run.write_episodes(f"step_{self.step:06d}", batch.episodes)
        if batch.dropped:
            self.run.write_episodes(f"dropped_{self.step:06d}", (e for g in batch.dropped for e in g.episodes))
        self._write(row)
        if self._due(self.config.checkpoint.every) or self._is_best():
            self.save()
        return row

    def collect(self) -> StepBatch:
        """The step's groups: played, filtered, and replaced where they did not pass."""
        batch = self.selection.collect(self.step, self.play)
        if batch.played and all(episode.stop_reason.failed for episode in batch.played):
            self._give_up(batch.played)
        if not batch.groups:
            self.observer.on_note(f"step {self.step + 1}: no group passed the filters; the weights stay as they are.")
        return batch

    def play(self, tasks: Sequence[Task]) -> list[Group]:
        """`group_size` episodes of every task; this process plays its share of them."""
        size = self.config.group_size
        mine = self.world.shard(tasks)
        count = self._counting("rollout", len(mine) * size)
        played = self.drivers.play(
            mine, group_size=size, seed=self.config.seed, sampling=self.config.sampling, on_episode=count
        )
        groups = self.world.unshard(played, "rollout")
        self.rewards.see(episode for g in groups for episode in g.episodes)
        return groups

    def batches(self, groups: Sequence[Group]) -> list[Batch]:
        """The step's groups, their advantages computed together, as one packed batch for each of its `minibatches`."""
        advantages: Floats = np.zeros((0, self.config.group_size))
        if groups:
            rewards = rewards_of(groups, **scoring(self.env_specs, groups), overlong=self.config.overlong)
            advantages = self.compute_advantages(rewards)
        n = self.config.minibatches
        return [self.pack(groups[i::n], advantages[i::n]) for i in range(n)]

    def pack(self, groups: Sequence[Group], advantages: Floats | None = None) -> Batch:
        """Groups as packed micro-batches."""
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

    def learn(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """The rollout's optimizer steps: `epochs` times over its `minibatches`; old log-probabilities stay."""
        config, temperature = self.config, self.config.sampling.temperature
        updates = config.minibatches * config.epochs
        reseed(config.seed, self.step)  # whatever the environments drew
        self.observer.on_phase("train", updates)
        batches = self.batches(group(episodes, config.group_size))
        if updates > 1 and config.loss.correction.name != "none":
            batches = [self.learner.compute_proximal_logprobs(batch, temperature=temperature) for batch in batches]
        rows = []
        for batch in batches * config.epochs:
            rows.append(self.budget.step(batch, temperature=temperature))
            self.observer.on_progress(len(rows))
        return combine(rows)

    def evaluate(self) -> dict[str, float]:
        """Mean rewards on unseen problems, greedy and sampled; greedy transcripts go to the run folder."""
        times: dict[str, float] = {}
        reseed(self.config.seed, self.step)
        with clock(times, "time/eval"):
            row, transcripts = self.evaluation(self._play)
        for name, episodes in transcripts.items():
            self.run.write_episodes("_".join(filter(None, (f"eval_{self.step:06d}", name))), episodes)
        return {**row, **eval_reward(self.env_specs, row), **times} if row else {}

    def moved(self) -> dict[str, float]:
        """Where an evaluation follows: how far the policy is from its start, on what the first step sampled."""
        if self.step == 0 or not self._due(self.config.eval.every, self.step + 1):
            return {}

        def start() -> list[Episode]:
            with suppress(CheckpointError):  # nobody has to keep them
                return self.run.read_episodes("step_000001")
            return []

        episodes = self.world.on_rank0(start, "reading the first step's episodes")
        temperature = self.config.sampling.temperature
        return {MOVED: kl_from_start(self.learner, episodes, temperature=temperature, max_tokens=self.budget.tokens)}

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        self.observer.on_phase("save", 1)
        return self.run.save(self.step, self._save_to, keep=self.config.checkpoint.keep, best=self._is_best())

    def close(self) -> None:
        """Closes environments, the engine and the loggers, and takes leave of the other processes."""
        for part in (self.drivers, self.evaluation, self.sync, self.loggers, self.world):
            part.close()
        self.run.release()

    def _give_up(self, episodes: Sequence[Episode]) -> None:
        """Ends a run whose episodes all fail, with nothing lost: they are written, and what was learned before."""
        self.run.write_episodes(f"failed_{self.step + 1:06d}", episodes)
        if self.step and not self._due(self.config.checkpoint.every):
            self.save()
        first = episodes[0]
        raise TrainingError(
            f"step {self.step + 1}: each of its {len(episodes)} episodes failed: nothing can be learned; the "
            f"first ended with {first.stop_reason} ({first.error}). All are in {self.run.path / 'episodes'}."
        )

    def _save_to(self, folder: Path) -> None:
        save(self.learner, load_tokenizer(self.config.model, self.config.chat_template), folder)
        if self.world.rank == 0:
            self.selection.save(folder)

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

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _is_best(self) -> bool:
        """Whether the run keeps its best step, and that is the one just written."""
        best = lambda: self.run.best(best_metric(self.env_specs)) == self.step  # noqa: E731
        return self.config.checkpoint.keep_best and self.world.on_rank0(best, "choosing the best step")

    def _write(self, row: Mapping[str, Any]) -> None:
        self.run.log(row)
        self.loggers.log(row)
        self.observer.on_row(row)
        found = alarms(row)
        for name in sorted(found.keys() - self.alarmed):
            self.observer.on_note(f"Warning: step {self.step}: {found[name]}")
        self.alarmed |= found.keys()


def default_folder(env: str) -> Path:
    """`runs/<env>-<time>`, in the current folder."""
    name = re.sub(r"[^\w.-]+", "-", env.rpartition("/")[2])
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
