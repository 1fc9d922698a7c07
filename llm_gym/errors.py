"""Everything that llm_gym raises on purpose, and the one place that decides "data or crash".

    LLMGymError
    ├── SettingError        a bad setting: raised at start, before any model loads
    │   ├── ConfigError     a configuration key or value
    │   ├── DataError       a data set, its path, split or columns
    │   └── TemplateError   a chat template that cannot be extended exactly
    ├── RewardError         a reward function failed; the episode ends with `reward_error`
    ├── BadReply            a reply that nothing can be made of: it scores 0, and is counted
    ├── ToolError           a tool call failed; the model is told, the episode goes on
    ├── ToolFailure         a tool broke; the episode ends with `tool_failure`
    ├── PolicyError         the engine failed for one request
    ├── SyncError           the sampler does not serve the learner's weights: training stops
    ├── TrainingError       every episode of a step failed: training stops
    │   └── Diverged        a gradient that is not finite; the step was not taken
    ├── ShortOfMemory       a micro-batch that does not fit; nothing of its step has happened
    ├── RankError           another process of the run is gone or stuck: training stops
    └── CheckpointError     a run folder or checkpoint that cannot be read

A bad *setting* is a crash with one clear sentence. A bad *rollout* is data: `boundary` turns the
exception of one episode into the `StopReason` it ends with, or re-raises what must stop the run.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from llm_gym.core import StopReason


class LLMGymError(Exception):
    """Base of every error that llm_gym raises on purpose; its text is one sentence for a person."""


class SettingError(LLMGymError, ValueError):
    """A setting that cannot work, found before anything expensive was started."""


class ConfigError(SettingError):
    """An unknown configuration key, or a value of the wrong type or range."""


class DataError(SettingError):
    """A data set that cannot be found or read, or lacks a column."""


class TemplateError(SettingError):
    """A chat template that is missing, or that cannot be extended without re-encoding history."""


class ToolError(LLMGymError):
    """A tool call that failed; its text is what the model is told."""


class ToolFailure(LLMGymError):
    """A tool that broke in a way that is not the policy's doing: a dead server, a lost sandbox."""


class RewardError(LLMGymError, ValueError):
    """A reward function that raised, or gave neither a finite number nor a mapping of names to finite numbers."""


class BadReply(LLMGymError, ValueError):
    """A reply that a scorer can make nothing of, by the reply's own fault: it scores 0, and ends with `bad_reply`.

    A reward function, `reply` or `final` raises it where the text is no JSON, crashes a parser, runs for ever ... Any
    other exception counts as the scorer's fault: the episode fails, and is not trained on.
    """


class PolicyError(LLMGymError):
    """The engine could not complete one request; the episode ends, the run goes on."""


class SyncError(LLMGymError):
    """The learner's weights did not arrive in the sampler; going on would train on another policy's samples."""


class TrainingError(LLMGymError):
    """Training cannot go on; what it has done so far is in the run folder."""


class Diverged(TrainingError, FloatingPointError):
    """A gradient that is not finite: the step would ruin the weights, and was not taken."""


class ShortOfMemory(LLMGymError):
    """A micro-batch that does not fit into memory; its step has changed neither weights nor counts."""


class RankError(LLMGymError):
    """Another process of the run is gone or stuck; the text names it."""


class CheckpointError(LLMGymError):
    """A run folder or checkpoint that is missing, incomplete or of another run."""


FAULTS = (Exception, SystemExit)
"""What code of a user's own may raise that is its fault; `sys.exit` in it ends no run. Ctrl-C is nobody's."""


def boundary(error: BaseException, *, policy: bool) -> StopReason:
    """The stop reason of an episode in which `error` was raised; re-raises what must stop the run.

    Args:
        error: what the environment (`policy=False`) or the policy (`policy=True`) raised.
        policy: whether the exception came out of the policy.

    Raises:
        BaseException: `error` itself, if it is a `SettingError` (a user's mistake that every episode
            would repeat) or none of `FAULTS` (Ctrl-C, cancellation).
    """
    if isinstance(error, SettingError) or not isinstance(error, FAULTS):
        raise error
    if policy:
        return StopReason.POLICY_ERROR
    ends = {ToolFailure: StopReason.TOOL_FAILURE, RewardError: StopReason.REWARD_ERROR}
    return next((end for kind, end in ends.items() if isinstance(error, kind)), StopReason.ENV_ERROR)


def unknown(argument: str, value: object, valid: Iterable[str]) -> str:
    """One sentence naming the argument, the value received and the nearest valid one."""
    names = sorted(valid)
    hint = suggestion(value, names) or f"valid: {', '.join(names)}."
    return f"{argument}: unknown value {value!r}; {hint}"


def suggestion(value: object, valid: Iterable[str], folder: str = "") -> str:
    """`did you mean 'x'?` with the valid name nearest to `value` (in `folder`, if they are files); "" if none is near.

    It ends a sentence; what goes on behind it has it in brackets.
    """
    near = nearest(value, valid)
    return "" if near is None else f"did you mean {os.path.join(folder, near)!r}?"


def nearest(value: object, valid: Iterable[str]) -> str | None:
    """The valid name nearest to `value`, if one is near: the first that begins with it, or else the most alike."""
    said, names = str(value), list(valid)
    begun = [name for name in names if name.startswith(said) and len(said) > 2]
    return next(iter(begun or difflib.get_close_matches(said, names, n=1, cutoff=0.5)), None)


def ended(text: object) -> str:
    """Words of somebody else as the end of a sentence: with a full stop, unless they have an end already."""
    said = str(text).rstrip()
    return said if said.endswith((".", "?", "!")) else f"{said}."


def words(error: BaseException) -> str:
    """What somebody else's exception says; "" where it says nothing, or even that fails."""
    try:
        return str(error)
    except (Exception, SystemExit):
        return ""


def described(error: BaseException) -> str:
    """Kind and words of somebody else's exception: `KeyError: 'answer'`."""
    return ": ".join(filter(None, (type(error).__name__, words(error))))


def import_of(argument: str, module: str, given: str) -> Any:
    """The module of a user's own that `given` names.

    Raises:
        SettingError: it cannot be imported, whatever its first lines raise; names `argument`.
    """
    try:
        return importlib.import_module(module)
    except LLMGymError:
        raise
    except FAULTS as error:
        said = str(error) if isinstance(error, ImportError) else " ".join(described(error).split())
        raise ConfigError(f"{argument}: cannot import {module!r} of {given!r}: {ended(said)}") from error


def function_of(argument: str, given: str) -> Any:
    """The function of a user's own that `package.module:function` names.

    Raises:
        ConfigError: it is no such name, or names none; names `argument`, and the nearest function there.
    """
    module_name, colon, name = given.partition(":")
    if not colon:
        raise ConfigError(f"{argument}: got {given!r}, want 'package.module:function'.")
    module = import_of(argument, module_name, given)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(unknown(argument, name, [n for n in vars(module) if callable(getattr(module, n))]))
    return function


def check_counts(given: Mapping[str, object]) -> None:
    """Checks that each value is a whole number of at least 1, or None.

    Raises:
        ConfigError: one is not; names it.
    """
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}: got {value!r}, want a whole number of at least 1.")


def place(function: Any, error: BaseException | None = None) -> str:
    """Where a function stands, or where in its file `error` was raised: `mine.py, line 5`; its name if nobody knows."""
    inner = inspect.unwrap(function)
    method = vars(inner).get("__init__") if isinstance(inner, type) else vars(type(inner)).get("__call__")
    code = getattr(inner, "__code__", None) or getattr(method, "__code__", None)
    if code is None:
        return str(getattr(function, "__qualname__", repr(function)))
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    lines = [frame.lineno for frame in frames if frame.filename == code.co_filename]
    return f"{code.co_filename}, line {lines[-1] if lines else code.co_firstlineno}"
