"""Several runs in a row, each starting from what the one before has made.

    # stages.yaml, for `llmgym run stages.yaml --out runs/x`
    model: null                   # what the first stage starts from; null: the embedded model
    stages:
      - sft: {dataset: chats.jsonl, steps: 100}
      - train: {env: Arithmetic-v0, steps: 60}

Stage 1 is an ordinary run in runs/x/1-sft, stage 2 in runs/x/2-train. All settings of all stages are looked at
before the first begins; a run that was stopped goes on at the stage where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llm_gym.errors import CheckpointError, ConfigError, SettingError, unknown
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.distributed.world import ParallelConfig, World, connect, here
from llm_gym.harness.loops.distill import check_distill
from llm_gym.harness.loops.preparation import prepare_run
from llm_gym.harness.loops.resuming import changed
from llm_gym.harness.loops.sft import MODEL, SFTConfig, check_sft, prepare, sft
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.runs.export import export_run
from llm_gym.harness.runs.lineage import STAGES, locate, model_path
from llm_gym.harness.runs.run_folder import RunFolder, put, step_of, write_atomically
from llm_gym.harness.settings import dump, load, read_yaml, to_dict
from llm_gym.templates import read_template
from llm_gym.tokenizer import load_tokenizer

T = TypeVar("T")

KINDS: dict[str, type[Any]] = {"sft": SFTConfig, "train": TrainConfig, "distill": TrainConfig}
"""What a stage may be -> its configuration."""
FIXED = {
    "model": "a stage starts from the one before; name the first model beside `stages`",
    "out": "every stage has its folder in the one of all",
}
"""Settings that a stage cannot have, and why."""
MERGED = "merged"
"""Folder, beside a stage's checkpoints, of the model that an adapter was folded into for the next stage."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run."""

    name: str
    """Its folder: `1-sft`."""
    kind: str
    """A key of `KINDS`."""
    config: Any
    """Without `model` (that of the stage before) and `out`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs."""

    model: str | None
    """What the first stage starts from; None: the embedded model."""
    stages: tuple[Stage, ...]


def read_plan(file: str | Path, sets: Iterable[str] = (), *, model: str | None = None) -> Plan:
    """The plan in a YAML file.

    Args:
        file: has `stages`, a list of `{kind: settings}`, and `model`.
        sets: `2.steps=80`: settings over those of the file, by number of the stage.
        model: over that of the file.

    Raises:
        ConfigError: something else is in it; the sentence names the stage.
    """
    data = _read(Path(file))
    found = data.get("stages")
    if not isinstance(found, list) or not found:
        raise ConfigError(f"stages: {str(file)!r} has {found!r}, want a list such as [sft: {{...}}, train: {{...}}].")
    over: dict[int, list[str]] = {}
    for text in sets:
        number, dot, assignment = text.partition(".")
        if not dot or not number.isdecimal() or not 1 <= int(number) <= len(found):
            raise ConfigError(f"--set: got {text!r}, want the number of a stage first, as in 1.steps=80.")
        over.setdefault(int(number), []).append(assignment)
    stages = tuple(_stage(i, item, over.get(i, [])) for i, item in enumerate(found, 1))
    return Plan(model_path(model or data.get("model")), stages)


def check_plan(plan: Plan) -> None:
    """Looks at every stage before the first begins.

    Raises:
        SettingError: a setting, environment, data set or teacher that cannot work; the sentence names the stage.
    """
    template = None
    for stage in plan.stages:
        template = stage.config.chat_template or template  # what a stage is given is saved with its model
        config = replace(stage.config, chat_template=template)
        config = config if getattr(config, "init", None) else replace(config, model=plan.model)
        try:
            world = World(*here(), config.parallel, device=device_of(config.device))
            config = config.resolved()
            if stage.kind == "sft":
                check_sft(config, device=world.device)
                prepare(config, None, load_tokenizer(config.tokenizer or plan.model, template))
                continue
            prepare_run(config, world)
            if stage.kind == "distill":
                check_distill(config)
        except SettingError as error:
            raise type(error)(f"{stage.name}: {error}") from error


def run_plan(
    plan: Plan,
    out: str | Path,
    *,
    resume: bool = False,
    observer: Callable[[Stage], object | None] = lambda stage: None,
    done: Callable[[Stage, Path], None] = lambda stage, folder: None,
) -> str:
    """Runs the stages that are not complete yet; returns the folder of the last one's model.

    Processes started by torchrun run every stage together, each as its own `parallel` says.

    Args:
        plan: from `read_plan`.
        out: the folder of all runs.
        resume: go on where a former call was stopped.
        observer: gives the observer of a stage; None: progress is shown on a terminal and in a notebook.
        done: is told of each stage when it is complete, and of its run folder; the first process tells.

    Raises:
        SettingError: see `check_plan`; or another setting of a stage that is complete, where `resuming` refuses it,
            or a later stage has begun with what it made.
        CheckpointError: `out` holds stages, and `resume` is not set.
    """
    out = Path(out)
    if (out / STAGES).exists() and not resume:
        raise CheckpointError(f"out: {str(out)!r} already holds stages; pass --resume, or another folder.")
    check_plan(plan)
    models = [plan.model, *_alone(partial(_open, plan, out), "opening the folder of the stages")]
    for stage in plan.stages[len(models) - 1 :]:
        folder = out / stage.name
        _alone(partial(shutil.rmtree, folder / MERGED, ignore_errors=True), f"before {stage.name}")
        play(stage, models[-1], folder, observer)
        if here()[0] == 0:
            done(stage, folder)
        models.append(_alone(partial(handed_on, folder), f"after {stage.name}"))
        _alone(partial(_write, plan, out), f"after {stage.name}")
    model = models[-1]
    assert model is not None
    return model


def complete(stage: Stage, folder: Path) -> bool:
    """Whether a stage has nothing left to do."""
    if stage.kind == "sft":
        return (folder / MODEL / "config.json").is_file()
    saved = RunFolder(folder).checkpoints()
    return bool(saved) and step_of(saved[-1]) >= stage.config.steps


def handed_on(folder: Path) -> str:
    """The model that the next stage starts from: a plain one, so an adapter is folded in."""
    if (folder / MODEL).is_dir():
        return str(folder / MODEL)
    source = locate(folder)
    if not source.tuned:
        return str(source.folder)
    if not (folder / MERGED).is_dir():
        export_run(folder, folder / MERGED)
    return str(folder / MERGED)


# Inside


def _alone(make: Callable[[], T], what: str) -> T:
    """What rank 0 makes, or raises, between two runs; on every rank."""
    world = connect(ParallelConfig())
    try:
        return world.on_rank0(make, what)
    finally:
        world.close()


def _open(plan: Plan, out: Path) -> list[str]:
    """Begins the folder of all runs, or looks at what is there: the models of stages complete as the plan has them.

    Any other stage is left to its own run, which looks at what it is given; but not beneath a later one.

    Raises:
        ConfigError: a later stage has begun with what such a stage had made.
    """
    models: list[str] = []
    for number, stage in enumerate(plan.stages, 1):
        folder = out / stage.name
        different = _different(stage, models[-1] if models else plan.model, folder, moves=bool(models))
        if different or not complete(stage, folder):
            later = next((s.name for s in plan.stages[number:] if RunFolder(out / s.name).config_file.exists()), None)
            if later:
                name, pair = next(iter(different.items()), ("", ("", "")))
                what = f"{name}: got {pair[1]!r} in place of {pair[0]!r}" if name else "its checkpoints are gone"
                raise ConfigError(
                    f"{stage.name}: {what}, but {later} has begun with what {stage.name} made in {str(out)!r}; "
                    "leave it as it was, or begin in another folder with --out."
                )
            break
        models.append(handed_on(folder))
    if not (out / STAGES).exists():
        _write(plan, out)
    return models


def _different(stage: Stage, model: str | None, folder: Path, *, moves: bool) -> dict[str, tuple[Any, Any]]:
    """The settings in which a stage's run, if it has begun, differs from the plan.

    With `moves`, its model is that of the stage before, wherever that lies now; its config.yaml then says so.
    """
    run = RunFolder(folder)
    if not run.config_file.is_file():
        return {}
    begun, given = load(KINDS[stage.kind], run.config_file), _settings(stage, model, folder)
    if moves and begun.model != model:
        begun = replace(begun, model=model)
        run.write_config(dump(begun))
    return changed(begun, (given.as_begun() if stage.kind == "sft" else given).resolved())


def _settings(stage: Stage, model: str | None, folder: Path) -> Any:
    """Of a stage's run, which starts from `model`."""
    if stage.kind != "sft":
        return replace(stage.config, model=model)
    return replace(stage.config, out=str(folder), model=None if stage.config.init else model)


def _write(plan: Plan, out: Path) -> None:
    """Writes the plan into the folder of all runs."""
    plain = {"model": plan.model, "stages": [{stage.kind: to_dict(stage.config)} for stage in plan.stages]}
    with put("out", out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / STAGES, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def play(stage: Stage, model: str | None, folder: Path, observer: Callable[[Stage], object | None]) -> None:
    """Runs a stage, or the rest of it."""
    config, watching = _settings(stage, model, folder), observer(stage)
    if stage.kind == "sft":
        sft(config, resume=True, progress=None if watching is None else True)
        return
    Trainer(config, out=folder, resume=True, observer=watching).train()


def _stage(number: int, item: Any, sets: list[str]) -> Stage:
    """One entry of the list."""
    where = f"stages[{number}]"
    if not isinstance(item, Mapping) or len(item) != 1:
        raise ConfigError(f"{where}: got {item!r:.80}, want one of {', '.join(KINDS)} and its settings.")
    ((kind, settings),) = item.items()
    if kind not in KINDS:
        raise ConfigError(unknown(where, kind, KINDS))
    for name in FIXED:
        if (settings or {}).get(name) is not None:
            raise ConfigError(f"{where}.{name}: got {settings[name]!r}, but {FIXED[name]}.")
    try:
        config = load(KINDS[kind], None, sets, **(settings or {}))
        config = replace(config, chat_template=read_template(config.chat_template))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if (kind == "distill") != (getattr(config, "distill", None) is not None):
        raise ConfigError(f"{where}: a `distill` stage, and no other, has distill.teacher.")
    if getattr(config, "init", None) and number > 1:
        raise ConfigError(f"{where}.init: only the first stage can start from random weights.")
    return Stage(f"{number}-{kind}", kind, config)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        data = read_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"stages: cannot read {str(file)!r} ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"stages: {str(file)!r} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"stages: {str(file)!r} holds a {type(data).__name__}, want `model` and `stages`.")
    for key in data:
        if key not in ("model", "stages"):
            raise ConfigError(unknown("key", key, ("model", "stages")))
    return data
