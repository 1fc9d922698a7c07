"""A run that goes on: which settings may be other ones, and what is kept of those that it had.

A checkpoint holds weights, the optimizer's state, how far each environment is, and groups that wait for a slot. A
setting that says what these are cannot change on the way (`FIXED`). Every other setting may: it counts from the next
step on, the run says so, and the settings of the steps before stay beside config.yaml, so that they replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, TypeVar

from llm_gym.errors import ConfigError
from llm_gym.harness.runs.run_folder import RunFolder, step_of
from llm_gym.harness.settings import dump, load, to_dict

T = TypeVar("T")


def _always(config: Any) -> bool:
    return True


def _groups_wait(config: Any) -> bool:
    return bool(config.oversample.max_factor > 1) or _ahead(config)


def _ahead(config: Any) -> bool:
    return bool(config.stream.max_staleness)


def _rows_are_counted(config: Any) -> bool:
    curricula = [config.curriculum, *(entry.curriculum for entry in config.envs if entry.curriculum)]
    return any(curriculum.name != "uniform" for curriculum in curricula)


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings that a run keeps to its end."""

    names: tuple[str, ...]
    """Dotted; `*` stands for anything."""
    why: str
    """What the checkpoint holds."""
    where: Callable[[Any], bool] = _always
    """Of which configurations this is true."""


FIXED = (
    Rule(("model", "init", "tokenizer"), "the checkpoint holds the weights and the tokenizer of the former"),
    Rule(("lora", "lora.*"), "the checkpoint holds the adapters, or the plain weights, of the former"),
    Rule(("optimizer.name",), "the checkpoint holds the state of the former"),
    Rule(("memory.train_layers",), "the checkpoint holds the optimizer's state of the former's weights"),
    Rule(("env", "envs", "envs.*.env", "envs.*.name"), "the checkpoint holds how far the former environments are"),
    Rule(
        ("curriculum.name", "envs.*.curriculum", "envs.*.curriculum.name"),
        "the checkpoint holds where the former curriculum is",
    ),
    Rule(
        tuple(
            f"{place}.{name}" for place in ("env_args", "envs.*.env_args") for name in ("dataset", "split", "config")
        ),
        "the curriculum in the checkpoint counts the rows of the former data",
        _rows_are_counted,
    ),
    Rule(("group_size",), "groups of the former size may wait in the checkpoint", _groups_wait),
    Rule(("stream.max_staleness",), "the checkpoint holds what was played ahead for the former, or nothing"),
    Rule(("prompts_per_step",), "the checkpoint numbers its tasks by steps of the former size", _ahead),
)
"""Every other setting may change."""
NOTHING_TRAINED = ("out", "save_dtype")
"""Settings that a complete run may be given as well."""


@dataclass(frozen=True, slots=True)
class Opened(Generic[T]):
    """A run folder, ready to be written to."""

    checkpoint: Path | None
    """What it goes on from; None: the start."""
    config: T
    note: str = ""
    """What a person should know; empty: nothing."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def open_run(run: RunFolder, config: T, *, resume: bool, steps: int) -> Opened[T]:
    """Begins a run in its folder, or rewinds it to its newest checkpoint.

    Args:
        run: the folder; it is held from here on.
        config: the settings, resolved.
        resume: go on with what is there, if there is something.
        steps: of the whole run.

    Raises:
        CheckpointError: the folder holds a run, and `resume` is not set; or another process is at work on it.
        ConfigError: settings that cannot change, or that would change nothing any more.
    """
    if not resume or not run.config_file.exists():
        run.start(dump(config))
        return Opened(None, config)
    run.hold()
    begun: Any = load(type(config), run.config_file)
    given: Any = config
    if given.token_budget == "auto":
        config = given = replace(given, token_budget=begun.token_budget)  # it packs its rows alike
    saved = run.checkpoints()
    step = step_of(saved[-1]) if saved else 0
    different = changed(begun, config)
    check_changes(different, begun, step=step, steps=steps, out=run.path)
    run.change_config(dump(config), step)
    run.rewind(step if saved else -1)
    return Opened(saved[-1] if saved else None, config, _note(different, step))


def changed(begun: Any, config: Any) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name: what the run had, and what it is given.

    A rate that an older version left open, one that no version ever decides by itself, and a token budget that is
    left open now, are no differences.
    """
    if config.token_budget == "auto":
        config = replace(config, token_budget=begun.token_budget)
    found = dict(_differences(to_dict(begun), to_dict(config)))
    open_rates = [name for name in ("optimizer.lr", "optimizer.muon_lr") if found.get(name, (0,))[0] is None]
    return {name: pair for name, pair in found.items() if name not in ("out", *open_rates)}


def check_changes(
    different: Mapping[str, tuple[Any, Any]], begun: Any, *, step: int, steps: int, out: str | Path
) -> None:
    """Looks whether a run may go on with other settings.

    Args:
        different: from `changed`.
        begun: the configuration that it had.
        step: the step of its newest checkpoint; 0: it has none, and begins anew.
        steps: of the whole run, as it is wanted now.
        out: its folder.

    Raises:
        ConfigError: it may not; the sentence says why, and what to do.
    """
    if not step:
        return
    for name, (before, after) in different.items():
        if rule := next((rule for rule in FIXED if _applies(rule, name, begun)), None):
            raise ConfigError(
                f"{name}: the run in {str(out)!r} cannot go on with {after!r} in place of {before!r}: {rule.why}; "
                f"start another run from its model, with model={out} and another folder."
            )
    late = [name for name in different if name not in NOTHING_TRAINED]
    if late and step >= steps:
        name = late[0]
        raise ConfigError(
            f"{name}: got {different[name][1]!r} in place of {different[name][0]!r}, but the run in {str(out)!r} has "
            f"done {step} steps of {steps}, and none is left that could be trained so; ask for more steps, or start "
            "another run."
        )


def _applies(rule: Rule, name: str, begun: Any) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in rule.names) and rule.where(begun)


def _note(different: Mapping[str, tuple[Any, Any]], step: int) -> str:
    """What is other than before, in words."""
    if not different:
        return ""
    told = "; ".join(f"{name} {after!r} (was {before!r})" for name, (before, after) in different.items())
    return f"resume: from step {step + 1} on with other settings: {told}."


def _differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Leaves of two plain configurations that are not equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else str(key))
    elif _tables(one) and _tables(other) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(a, b, f"{name}.{i}")
    elif one != other:
        yield name, (one, other)


def _tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
