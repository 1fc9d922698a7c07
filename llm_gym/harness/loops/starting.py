"""The start of a run, up to the point where something is loaded: settings looked at, folder opened, watchers told."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from llm_gym.harness.config import TrainConfig
from llm_gym.harness.distributed.world import World, connect
from llm_gym.harness.loops.distill import check_distill, group_learner_of
from llm_gym.harness.loops.group_learner import GroupLearner
from llm_gym.harness.loops.observer import Observer, listening
from llm_gym.harness.loops.preparation import Prepared, prepare_run
from llm_gym.harness.loops.progress import default_observer
from llm_gym.harness.loops.resuming import open_run
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.runs import provenance
from llm_gym.harness.runs.loggers import Loggers
from llm_gym.harness.runs.run_folder import NonZeroRankRunFolder, RunFolder
from llm_gym.harness.settings import to_dict


@dataclass(frozen=True)
class Started:
    """A run whose settings are sound and whose folder is its own; nothing is loaded yet."""

    config: TrainConfig
    """Of the run that goes on, where it does."""
    world: World
    observer: Observer
    """Hears everything on rank 0, nothing on the others."""
    prepared: Prepared
    run: RunFolder
    loggers: Loggers
    checkpoint: Path | None
    """What it goes on from; None: the start."""
    step: int
    """Steps done."""


def start_run(
    config: TrainConfig, *, out: str | Path | None, resume: bool, observer: object | None, learns: bool
) -> Started:
    """Starts a run; the arguments and errors are those of `Trainer`."""
    config = _resolved(config)
    world = connect(config.parallel, device_of(config.device))
    heard = listening(default_observer(observer) if world.rank == 0 else None)
    prepared = prepare_run(config, world, learns=learns)
    first = prepared.env_specs[0].env_id
    path = world.on_rank0(lambda: out or default_folder(first), "naming the run folder")
    run = RunFolder(path) if world.rank == 0 else NonZeroRankRunFolder(path)
    begin = partial(open_run, run, config, resume=resume, steps=config.steps)
    opened = world.on_rank0(begin, "opening the run folder")
    if opened.checkpoint is not None:
        prepared.selection.restore(opened.checkpoint)
    heard.on_start(opened.config, run.path, opened.step)
    run.add_provenance(provenance.describe(first, opened.step, world.size))
    if opened.note:
        heard.on_note(opened.note)
    loggers = Loggers(heard.on_note)
    log = partial(loggers.start, opened.config.log, run.path, to_dict(opened.config), opened.step)
    world.on_rank0(log, "starting the loggers")
    return Started(opened.config, world, heard, prepared, run, loggers, opened.checkpoint, opened.step)


def load_group_learner(
    config: TrainConfig, world: World | None = None, observer: object | None = None, checkpoint: Path | None = None
) -> GroupLearner:
    """What learns in a run, without an engine: for a loop of your own over groups that were played elsewhere.

    Args:
        config: the run's; with `distill` set a teacher judges.
        world: the ranks that train together; None: this process alone.
        observer: is told what happens.
        checkpoint: what to go on from; None: the untrained model.

    Raises:
        SettingError: settings that cannot work.
    """
    world = world or World()
    config = _resolved(config)
    learning = group_learner_of(config)(config, prepare_run(config, world), world, listening(observer), checkpoint)
    learning.measure()
    return learning


def default_folder(env: str) -> Path:
    """`runs/<env>-<time>`, in the current folder."""
    name = re.sub(r"[^\w.-]+", "-", env.rpartition("/")[2])
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _resolved(config: TrainConfig) -> TrainConfig:
    """Every setting that depends on others filled in; a teacher is looked at first."""
    if config.distill is not None:
        config = replace(config, distill=check_distill(config))
    return config.resolved()
