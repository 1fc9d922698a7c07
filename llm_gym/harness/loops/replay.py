"""Training on saved episodes alone, and how it compares with what the run recorded: bit for bit, or where not.

On the machine and with the versions of the run (provenance.yaml), every metric of the learner and every weight comes
out the same. Where something differs, that is what to look at: other kernels, other threads, a changed environment's
reward weights, or a bug.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from llm_gym.core import group
from llm_gym.errors import CheckpointError
from llm_gym.harness.config import PolicyConfig, TrainConfig
from llm_gym.harness.distributed.fsdp import read_parts
from llm_gym.harness.distributed.groups import own_groups
from llm_gym.harness.distributed.world import connect
from llm_gym.harness.evaluation.evaluator import EvalConfig
from llm_gym.harness.learner.weights import PARTS, STATE, read_tensors
from llm_gym.harness.loops.group_learner import GroupLearner
from llm_gym.harness.loops.starting import load_group_learner
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.runs.lineage import no_run
from llm_gym.harness.runs.loggers import LogConfig
from llm_gym.harness.runs.run_folder import RunFolder, put, step_of
from llm_gym.harness.settings import load

COMPARED = ("policy/", "sampler/", "tokens/trained")
"""How the names of metrics begin that depend on nothing but episodes and weights."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric or a tensor that did not come out as recorded."""

    name: str
    said: str
    """In words: both values, or how many elements differ, and by how much."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One step, trained again."""

    step: int
    learned: Mapping[str, float]
    """The learner's metrics."""
    metrics: int
    """How many of them the run recorded; 0 if it never trained on these episodes."""
    tensors: int
    """Weights and optimizer tensors compared; 0 if the run has no checkpoint of this step."""
    differences: tuple[Difference, ...]


def starting_point(run: RunFolder, step: int, source: Path | None = None) -> tuple[int, Path | None]:
    """The steps done before a replay, and the checkpoint that holds them (None: the untrained model).

    It is `source`, or the newest checkpoint before `step`, or the start; every later step is replayed too.

    Raises:
        CheckpointError: `step` was never played, `source` is no checkpoint before it, or episodes are missing between,
            or settings have changed.
    """
    played = run.steps_played()
    if not played and not run.config_file.is_file():
        raise no_run(run.path)
    if step not in played:
        which = f"steps {played[0]} to {played[-1]}" if played else "no step"
        raise CheckpointError(f"step: got {step}, but {str(run.path)!r} holds the episodes of {which}.")
    if source is None:
        source = next((c for c in reversed(run.checkpoints()) if step_of(c) < step), None)
    start = 0 if source is None else _step(source, step)
    if missing := sorted(set(range(start + 1, step)) - set(played)):
        raise CheckpointError(f"step: {step} builds on step {missing[0]}, whose episodes {str(run.path)!r} lacks.")
    if other := next((at for at in range(start + 1, step) if run.config_of(at) != run.config_of(step)), None):
        raise CheckpointError(
            f"step: {step} builds on step {other}, before which the run went on with other settings, and there is no "
            f"checkpoint in between; replay up to there, or from a checkpoint of later steps."
        )
    return start, source


def make_folder(out: Path) -> None:
    """Makes the folder that the trained weights go to, before they are trained.

    Raises:
        CheckpointError: it cannot be made.
    """
    with put("out", out):
        out.mkdir(parents=True, exist_ok=True)


def processes_of(run: RunFolder, step: int) -> int:
    """How many processes trained a step of the run, as far as provenance.yaml says; else 1."""
    try:
        starts = yaml.safe_load((run.path / "provenance.yaml").read_text("utf-8"))
        return int([start.get("processes", 1) for start in starts if start["step"] < step][-1])
    except (OSError, LookupError, TypeError, yaml.YAMLError):
        return 1


def _step(checkpoint: Path, step: int) -> int:
    """The step of a checkpoint, which must be before `step`; `best` is a link to one with a number."""
    folder = checkpoint.resolve()
    number = folder.name.removeprefix("step_")
    if not number.isdigit() or int(number) >= step or not any((folder / name).exists() for name in (STATE, PARTS)):
        raise CheckpointError(f"from: got {str(checkpoint)!r}, want a checkpoint step_... before step {step}.")
    return int(number)


def replay(
    run: str | Path,
    step: int,
    *,
    source: str | Path | None = None,
    sets: Iterable[str] = (),
    out: str | Path | None = None,
    observer: object | None = None,
) -> Iterator[Replayed]:
    """Trains on the saved episodes of every step from the starting point to `step`, and compares each.

    Processes started by torchrun replay together; the differences that rank 0 has seen are everybody's.

    Args:
        run: a run folder; it is only read.
        step: the last step to train.
        source: a checkpoint to start from; None: see `starting_point`.
        sets: settings over the run's, as `--set` takes them: to see what a change would have done.
        out: a folder for the trained weights and optimizer; None: they are not kept.
        observer: is told what happens; None: nobody is.

    Raises:
        SettingError: settings that cannot work.
        CheckpointError: see `starting_point`; or `out` cannot be written.
    """
    folder = RunFolder(run)
    start, checkpoint = starting_point(folder, step, None if source is None else Path(source))
    config = load(TrainConfig, folder.config_of(step), sets)
    saving = replace(config.checkpoint, keep_best=False)  # nothing is measured
    config = replace(config, eval=EvalConfig(episodes=0), checkpoint=saving, log=LogConfig(), policy=PolicyConfig())
    recorded = {row["step"]: row for row in folder.metrics()}
    if out is not None:
        make_folder(Path(out))
    world = connect(config.parallel, device_of(config.device))
    try:
        learning = load_group_learner(config, world, observer, checkpoint)
        for at in range(start + 1, step + 1):
            groups = own_groups(world, group(folder.read_episodes(f"step_{at:06d}"), config.group_size))
            with world.blame_lost_rank("replay"):
                learned = learning.learn(groups, at - 1)
            compared, found = compare_metrics(recorded.get(at, {}), learned)
            tensors, more = _compare_checkpoint(learning, folder.path / "checkpoints" / f"step_{at:06d}")
            yield Replayed(at, learned, compared, tensors, found + more)
        if out is not None:
            with put("out", Path(out)):
                learning.save(Path(out))
    finally:
        world.close()


def _compare_checkpoint(learning: GroupLearner, saved: Path) -> tuple[int, tuple[Difference, ...]]:
    """What the run saved of a step, if it did, against the same step replayed; looked at by the first process."""
    if not saved.is_dir():
        return 0, ()
    world = learning.world
    with TemporaryDirectory() as scratch:
        again = world.on_rank0(lambda: Path(scratch), "comparing")
        learning.save(again)

        def compare() -> tuple[int, tuple[Difference, ...]]:
            alike = [name for name in (STATE, PARTS) if all((folder / name).exists() for folder in (saved, again))]
            return compare_tensors(_state(saved, alike), _state(again, alike))

        return world.on_rank0(compare, "comparing")


def compare_metrics(recorded: Mapping[str, Any], learned: Mapping[str, Any]) -> tuple[int, tuple[Difference, ...]]:
    """How many metrics were compared, and those that are not equal; NaN was recorded as null, and equals itself."""
    names = [name for name in learned if name in recorded and name.startswith(COMPARED)]
    known = {name: math.nan if recorded[name] is None else recorded[name] for name in names}
    differ = [
        n for n in names if known[n] != learned[n] and not (math.isnan(known[n]) and not math.isfinite(learned[n]))
    ]
    return len(names), tuple(Difference(n, f"recorded {known[n]!r}, replayed {learned[n]!r}") for n in differ)


def compare_tensors(
    recorded: Mapping[str, Tensor], replayed: Mapping[str, Tensor]
) -> tuple[int, tuple[Difference, ...]]:
    """How many tensors were compared, and those that are not equal to the last bit."""
    found = []
    for name in [*recorded, *(name for name in replayed if name not in recorded)]:
        a, b = recorded.get(name), replayed.get(name)
        if a is None or b is None:
            found.append(Difference(name, "only replayed" if a is None else "only recorded"))
        elif a.shape != b.shape or a.dtype != b.dtype:
            found.append(Difference(name, f"recorded {a.dtype} {[*a.shape]}, replayed {b.dtype} {[*b.shape]}"))
        elif not torch.equal(a, b):
            apart = (a.double() - b.double()).abs()
            count, most = int((a != b).sum()), float(apart.max())
            found.append(Difference(name, f"{count:,} of {a.numel():,} values differ, at most by {most:.3g}"))
    return len({*recorded, *replayed}), tuple(found)


def _state(checkpoint: Path, optimizers: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, then the optimizer's state by the form in which it lies there."""
    found = {f"weights: {name}": t for name, t in read_tensors(checkpoint).items()}
    for name in optimizers:
        file = checkpoint / name
        state = read_parts(file) if name == PARTS else torch.load(file, weights_only=True)
        found |= dict(_flat(state, "optimizer: "))
    return found


def _flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers of nested containers, with the path to each as its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}{key}" if name.endswith(" ") else f"{name}.{key}")
    elif isinstance(value, list | tuple):
        yield from _flat(dict(enumerate(value)), name)
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, int | float):
        yield name, torch.tensor(value, dtype=torch.float64)
