"""The training loop, readable as a list of verbs: draw, roll out, compute advantages, pack, step, sync, write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_gym.core import Episode
from llm_gym.errors import CheckpointError, TrainingError
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.mixture import describe_each
from llm_gym.harness.data.selection import StepBatch
from llm_gym.harness.distributed.groups import whole_on_rank0
from llm_gym.harness.evaluation.kl_from_start import kl_from_start, some_of
from llm_gym.harness.loops.distill import group_learner_of
from llm_gym.harness.loops.environments import best_metric, eval_reward
from llm_gym.harness.loops.group_player import GroupPlayer
from llm_gym.harness.loops.observer import Observer as Observer
from llm_gym.harness.loops.starting import start_run
from llm_gym.harness.randomness import reseed
from llm_gym.harness.runs.metrics import Times, clock, describe, speeds, staleness, timeline
from llm_gym.harness.runs.verdict import MOVED, alarms
from llm_gym.harness.settings import dump


class Trainer:
    """Trains a policy on an environment.

    >>> import tempfile
    >>> config = TrainConfig(steps=1, prompts_per_step=2, group_size=2, eval={"episodes": 0})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = Trainer(config, out=folder + "/run").train()
    >>> [row["step"] for row in rows]
    [0, 1]

    Args:
        config: every decision of the run; with `distill` set a teacher judges, in place of rewards.
        out: the run folder; None: `runs/<env>-<time>`.
        resume: go on from the folder's newest checkpoint, or from the start if there is none yet.
        observer: is told what happens; any object with some of the methods of `Observer`. None: progress is shown on
            a terminal and in a notebook.
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
        learns: bool = True,
    ) -> None:
        started = start_run(config, out=out, resume=resume, observer=observer, learns=learns)
        self.world, self.observer, self.run, self.step = started.world, started.observer, started.run, started.step
        self.since = self.step  # steps done before this process
        config, prepared = started.config, started.prepared
        self.env_specs, self.selection, self.loggers = prepared.env_specs, prepared.selection, started.loggers
        self.learning = group_learner_of(config)(config, prepared, self.world, self.observer, started.checkpoint)
        self.model, self.learner = self.learning.model, self.learning.learner
        self.playing = GroupPlayer(
            config, prepared, self.learner, self.observer, folder=self.run.path, version=self.step
        )
        self.policy, self.sync = self.playing.policy, self.playing.sync
        with self.sync.engine_asleep():
            tokens = self.learning.measure()
        self.config = replace(config, token_budget=tokens)  # resumed, the run packs its rows alike
        self.run.write_config(dump(self.config))
        self.alarmed = set[str]()  # what a person was warned of

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
        self._write_episodes(f"step_{self.step:06d}", batch.episodes)
        self._write({"step": self.step, **describe(batch.played), **batch.metrics, **times})

    def train_step(self) -> dict[str, Any]:
        """One step, from seeds to a row of metrics."""
        times = Times()
        reseed(self.config.seed, self.step)
        with clock(times, "time/step"):
            with clock(times, "time/rollout"):
                batch = self.collect()
            with clock(times, "time/train"), self.playing.alone(), self.world.blame_lost_rank("training"):
                learned = self.learning.learn(batch.groups, self.step) | self.moved()
            with clock(times, "time/sync"):
                synced = self.bring_up_to_date()
        told = describe(batch.played) | describe_each(self.env_specs, batch.played) | batch.metrics
        told |= {"sampler/staleness_max": staleness(batch.episodes, self.step)}
        self.step += 1
        slowest = self.world.reduce_max(times, "a step")
        row = {"step": self.step, **told, **learned, **synced, **slowest}
        row |= speeds(learned, told["tokens/generated"], slowest, ahead=self.config.stream.max_staleness > 0)
        if self._due(self.config.eval.every):
            with clock(times, "time/eval"):
                row |= self.evaluate()
        self._write_episodes(f"step_{self.step:06d}", batch.episodes)
        if batch.dropped:
            self._write_episodes(f"dropped_{self.step:06d}", (e for g in batch.dropped for e in g.episodes))
        self._write(row)
        self.run.log_timeline(timeline(self.step, times, batch.spans, since=self.since))
        if self._due(self.config.checkpoint.every) or self._is_best():
            self.save()
        return row

    def bring_up_to_date(self) -> dict[str, Any]:
        """Sends the engine the weights of the step that was learned, where it is time for that."""
        version, every = self.step + 1, self.config.stream.sync_every
        if version % every and not self._due(self.config.eval.every, version):
            return {}
        self.observer.on_phase("sync", 1)
        synced = self.world.reduce_max(self.sync(version), "sync")
        self.playing.publish(version)
        self.selection.advance(version, self.playing)
        return synced

    def collect(self) -> StepBatch:
        """The step's groups: played, filtered, and replaced where they did not pass."""
        batch = self.selection.collect(self.step, self.playing)
        self.playing.rewards.see(batch.played)
        if batch.played and all(episode.stop_reason.failed for episode in batch.played):
            self._give_up(batch.played)
        if not batch.groups:
            self.observer.on_note(f"step {self.step + 1}: no group passed the filters; the weights stay as they are.")
        return batch

    def evaluate(self) -> dict[str, float]:
        """Mean rewards on unseen problems, greedy and sampled; greedy transcripts go to the run folder."""
        times: dict[str, float] = {}
        reseed(self.config.seed, self.step)
        with clock(times, "time/eval"):
            row, transcripts = self.playing.evaluate()
        for name, episodes in transcripts.items():
            self._write_episodes("_".join(filter(None, (f"eval_{self.step:06d}", name))), episodes)
        return {**row, **eval_reward(self.env_specs, row), **times} if row else {}

    def moved(self) -> dict[str, float]:
        """Where an evaluation follows: how far the policy is from its start, on what the first step sampled."""
        if self.step == 0 or not self._due(self.config.eval.every, self.step + 1):
            return {}

        def start() -> list[Episode]:
            with suppress(CheckpointError):  # nobody has to keep them
                return some_of(self.run.read_episodes("step_000001"))
            return []

        episodes = self.world.on_rank0(start, "reading the first step's episodes")
        temperature = self.config.sampling.temperature
        tokens = self.learning.budget.tokens
        return {MOVED: kl_from_start(self.learner, episodes, temperature=temperature, max_tokens=tokens)}

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        self.observer.on_phase("save", 1)
        return self.run.save(self.step, self._save_to, keep=self.config.checkpoint.keep, best=self._is_best())

    def close(self) -> None:
        """Closes environments, the engine and the loggers, and takes leave of the other processes."""
        for part in (self.selection, self.playing, self.loggers, self.world, self.learning):
            part.close()
        self.run.release()
        self.observer.on_close()

    def _give_up(self, episodes: Sequence[Episode]) -> None:
        """Ends a run whose episodes all fail, with nothing lost: they are written, and what was learned before."""
        self._write_episodes(f"failed_{self.step + 1:06d}", episodes)
        self.selection.put_back()
        if self.step and not self._due(self.config.checkpoint.every):
            self.save()
        first = episodes[0]
        raise TrainingError(
            f"step {self.step + 1}: each of its {len(episodes)} episodes failed: nothing can be learned; the "
            f"first ended with {first.stop_reason} ({first.error}). All are in {self.run.path / 'episodes'}."
        )

    def _save_to(self, folder: Path) -> None:
        self.learning.save(folder)
        self.selection.save(folder)

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _is_best(self) -> bool:
        """Whether the run keeps its best step, and that is the one just written."""
        best = lambda: self.run.best(best_metric(self.env_specs)) == self.step  # noqa: E731
        return self.config.checkpoint.keep_best and self.world.on_rank0(best, "choosing the best step")

    def _write_episodes(self, name: str, episodes: Iterable[Episode]) -> None:
        self.run.write_episodes(name, whole_on_rank0(self.world, episodes, "writing episodes"))

    def _write(self, row: Mapping[str, Any]) -> None:
        self.run.log(row)
        self.loggers.log(row)
        self.observer.on_row(row)
        found = alarms(row)
        for name in sorted(found.keys() - self.alarmed):
            self.observer.on_note(f"Warning: step {self.step}: {found[name]}")
        self.alarmed |= found.keys()
