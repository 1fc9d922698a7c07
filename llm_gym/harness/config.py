"""One typed, frozen configuration: dataclasses in Python, YAML on disk, `a.b=c` on the command line.

`load` builds any frozen dataclass (nested ones included) from a mapping; a key that does not exist or
a value of the wrong type is refused with one sentence before anything else happens.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from llm_gym.core import Sampling
from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.algorithms.presets import PRESETS
from llm_gym.harness.bounds import Within, check_bounds
from llm_gym.harness.data.curriculum import CurriculumConfig
from llm_gym.harness.data.filters import OversampleConfig
from llm_gym.harness.data.mixture import EnvConfig
from llm_gym.harness.distributed.world import ParallelConfig
from llm_gym.harness.evaluation.evaluator import EvalConfig
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.loops.teacher import DistillConfig
from llm_gym.harness.model.devices import check_device_name
from llm_gym.harness.model.loading import LoraConfig
from llm_gym.harness.model.memory import MemoryConfig
from llm_gym.harness.rates import Rates, hidden_size, rates
from llm_gym.harness.runs.lineage import model_path
from llm_gym.harness.runs.loggers import LogConfig
from llm_gym.templates import read_template

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 20
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Within("[0, inf)")] = 2
    """Newest checkpoints kept; 0: all of them."""
    keep_best: bool = False
    """Whether to save, and keep as `checkpoints/best`, the step with the best `eval/sampled_reward` (of a mixture,
    `eval/mixture_reward`)."""

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")


@dataclass(frozen=True)
class PolicyConfig:
    """The engine that samples."""

    engine: str = "auto"
    """`transformers` (built in), `vllm` (in this process) or `server`; `auto`: `server` if there are `servers`, else
    the built-in one."""
    sync: str = "auto"
    """How new weights reach the engine: a row of `sync.MODES`; `auto` measures where there is a choice."""
    canary_limit: Annotated[float | None, Within("(0, inf]")] = None
    """Largest difference (nats) between engine and learner on a token before a run is stopped; None: 1e-3 in
    float32, else by the learner's own rounding (docs/sync.md)."""
    sleep: bool = False
    """Whether vLLM frees its memory while the learner trains (CUDA only)."""
    max_rows: Annotated[int, Within("[1, inf)")] = 256
    """Sequences that the built-in engine decodes at once."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the vLLM engine, passed through (`gpu_memory_utilization`, `max_model_len` ...)."""
    servers: tuple[str, ...] = ()
    """Addresses of vLLM servers, such as `http://127.0.0.1:8000`; `llmgym serve` starts one."""
    server: Mapping[str, Any] = field(default_factory=dict)
    """How servers are used (`folder` for weights where memory is not shared, `retry_seconds`, `max_context` ...)."""

    def __post_init__(self) -> None:
        check_bounds(self, "policy")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    """What `load` takes for `preset`."""

    env: str = "Arithmetic-v0"
    """Environment id; short ids mean `llm_gym/...`, `module:id` imports the module first."""
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    envs: tuple[EnvConfig, ...] = ()
    """Several environments with weights, in place of `env`; `env_args` are then for all of them."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Which rows of the data are played, and when."""
    filters: Mapping[str, Any] = field(default_factory=dict)
    """Which groups are trained on: a row of `selection.FILTERS` or "package.module:function" -> its limit."""
    oversample: OversampleConfig = field(default_factory=OversampleConfig)
    """How groups that do not pass the filters are replaced."""
    model: str | None = None
    """Folder, hub id or run folder of the model; None: the embedded one."""
    chat_template: str | None = None
    """For a model without chat template (most base models), or over its own: `plain`, `chatml` or a .jinja file, whose
    text then stands here. It is saved with the model."""
    seed: Annotated[int, Within("[0, 18446744073709551616)")] = 0
    """Decides the tasks, the sampling and everything random."""
    steps: Annotated[int, Within("[1, inf)")] = 120
    """Rollouts, each followed by `minibatches` * `epochs` optimizer steps."""
    prompts_per_step: Annotated[int, Within("[1, inf)")] = 16
    """Tasks (groups) per step."""
    group_size: Annotated[int, Within("[1, inf)")] = 8
    """Episodes per task."""
    minibatches: Annotated[int, Within("[1, inf)")] = 1
    """Batches that a step's tasks are dealt into, with an optimizer step each."""
    epochs: Annotated[int, Within("[1, inf)")] = 1
    """Passes over a step's episodes; old log-probabilities stay as they were sampled."""
    advantage: str = "group_norm"
    """A row of `advantages.ADVANTAGES`, or "package.module:function"."""
    truncated: Literal["train", "mask"] = "train"
    """Episodes cut by length or time: `train` on them, or `mask` them out of the loss (they stay in baselines)."""
    overlong: Annotated[float, Within("[0, 1]")] = 0.0
    """Share of the completion limit over which a penalty grows from 0 to -1 (DAPO: 0.2); 0: none."""
    sampling: Sampling = field(default_factory=Sampling)
    """How training episodes are sampled."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    distill: DistillConfig | None = None
    """A teacher that judges in place of rewards (`llmgym distill`); None: reinforcement learning."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(schedule="linear", warmup_steps=5))
    """How the weights move."""
    lora: LoraConfig | None = None
    """Low-rank adapters; None trains every weight."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What memory is spent on."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The engine that samples."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several processes share the work (`llmgym train --nproc`)."""
    token_budget: Annotated[int | Literal["auto"], Within("[1, inf)")] = 16384
    """Most tokens in one micro-batch; the gradient does not depend on it. `auto`: measured when the run starts."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    threads: Annotated[int | None, Within("[1, inf)")] = None
    """CPU threads of torch; None: torch's own choice, but one for a model as small as the embedded one."""
    time_limit: Annotated[float | None, Within("(0, inf)")] = None
    """Seconds an episode may take."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on unseen problems."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    log: LogConfig = field(default_factory=LogConfig)
    """Where rows of metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.minibatches > self.prompts_per_step:
            raise ConfigError(f"minibatches: got {self.minibatches}, want at most the {self.prompts_per_step} prompts.")
        check_device_name(self.device)
        if not self.sampling.full_support:
            raise ConfigError(
                "sampling: training needs the full distribution (temperature > 0, top_k=0, top_p=1, min_p=0), "
                f"or the log-probabilities would be of another one; got {self.sampling}."
            )
        if (self.loss.kl == "none") != (self.loss.kl_weight == 0):
            raise ConfigError(f"loss.kl_weight: got {self.loss.kl_weight} with kl={self.loss.kl!r}; set both or none.")

    @property
    def title(self) -> str:
        """What is played, in a few words."""
        return " + ".join(entry.name or entry.env for entry in self.envs) or self.env

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.minibatches * self.epochs

    @property
    def rates(self) -> Rates:
        """The learning rates of the run, and why; only the model's config is read."""
        loop, model = "train" if self.distill is None else "distill", model_path(self.model)
        return rates(loop, self.optimizer, self.lora, model=model, width=hidden_size(model))

    def resolved(self) -> TrainConfig:
        """With every None filled in that depends on other settings, a run folder as model by what it trained, and a
        template's file by its text.

        Raises:
            CheckpointError: that run has saved nothing yet.
            ConfigError: no such template.
        """
        model = model_path(self.model)
        template, optimizer = read_template(self.chat_template), self.rates.fill(self.optimizer)
        return dataclasses.replace(self, model=model, chat_template=template, optimizer=optimizer)


def load(cls: type[T], file: str | Path | None = None, sets: Iterable[str] = (), **given: Any) -> T:
    """Builds a configuration: defaults, a preset, the YAML file, keyword arguments, `a.b=c` strings; the last wins.

    `preset` (in the file, the keywords or the strings) names a row of `cls.presets`; it is no setting itself.

    Args:
        cls: a (frozen) dataclass such as `TrainConfig`.
        file: a YAML file.
        sets: assignments with dotted keys; values are YAML scalars.
        given: top-level fields; None means "not given".

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    data = _read(Path(file)) if file is not None else {}
    data |= {key: value for key, value in given.items() if value is not None}
    assigned = [_assignment(text) for text in sets]
    named = [value for path, value in assigned if path == ["preset"]]
    data = _with_preset(cls, data | ({"preset": named[-1]} if named else {}))
    for path, value in assigned:
        if path != ["preset"] or "preset" in data:  # a class without presets does not know it
            _assign(data, path, value)
    return from_dict(cls, data)


def parse_scalar(text: str) -> Any:
    """A YAML scalar or flow collection; text that is no YAML is a string, and `1e-4` is a number.

    YAML's other surprises stay text as well: `-` and `a: b` (collections), `12:30` (a number in base 60), dates.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        return _number(value) if value == text.strip() else value
    if isinstance(value, list | dict):
        return value if text.lstrip()[0] in "[{" else text
    return value if isinstance(value, bool | int | float | None) and ":" not in text else text


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "", over: T | None = None) -> T:
    """A dataclass from a mapping, nested ones included; what the mapping leaves out is as in `over`, or default.

    Raises:
        ConfigError: names the key, the value received and the nearest valid one.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    base = {name: getattr(over, name) for name in names} if over is not None else _section_defaults(cls)
    for key in data:
        if key not in names:
            raise ConfigError(unknown("configuration key", f"{where}{key}", [f"{where}{name}" for name in names]))
    given = {key: _coerce(value, hints[key], f"{where}{key}", base.get(key)) for key, value in data.items()}
    try:
        return cls(**(base | given))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """The plain form of a configuration, complete, ready for YAML or JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump(config: Any) -> str:
    """YAML that `load` reads back to an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _read(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"config file: cannot read {str(file)!r} ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file: {str(file)!r} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config file: {str(file)!r} holds a {type(data).__name__}, want a mapping of settings.")
    return data


def _assignment(text: str) -> tuple[list[str], Any]:
    """`a.b=c` as a path and a value."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set: got {text!r}, want key=value such as loss.clip_high=0.28.")
    return key.strip().split("."), parse_scalar(value)


def _with_preset(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings over those of the preset that they name: sections setting by setting, all else (`filters`) whole."""
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "presets", {})
    if "preset" not in data or not presets:
        return dict(data)
    name = data["preset"]
    if name not in presets:
        raise ConfigError(unknown("preset", name, presets))
    under, over = presets[name], {key: value for key, value in data.items() if key != "preset"}
    both = [key for key in _section_defaults(cls) if isinstance(over.get(key), Mapping) and key in under]
    return {**under, **over, **{key: {**under[key], **over[key]} for key in both}}


def _assign(data: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, Mapping) else {}
        data = data[key]
    data[path[-1]] = value


def _number(text: str) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) and "_" not in text else text
    except ValueError:
        return text


def _section_defaults(cls: type[Any]) -> dict[str, Any]:
    """The nested sections as they are by default: a section given in part changes only that part."""
    made = {f.name: f.default_factory() for f in dataclasses.fields(cls) if callable(f.default_factory)}
    return {name: value for name, value in made.items() if dataclasses.is_dataclass(value)}


def _coerce(value: Any, hint: Any, where: str, over: Any = None) -> Any:
    """`value` as the annotated type, or a ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(unknown(where, value, map(str, args)))
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        _require(isinstance(value, Mapping), where, value, "a mapping of settings")
        return from_dict(typing.cast(type, hint), value, f"{where}.", over)
    if origin is tuple:
        _require(isinstance(value, list | tuple), where, value, "a list")
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        _require(inner is not None or len(value) == len(args), where, value, f"{len(args)} values")
        return tuple(_coerce(v, inner or args[i], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), where, value, "a mapping")
        return dict(value)
    return _coerce_scalar(value, hint, where)


def _coerce_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    concrete = [option for option in options if option is not type(None)]
    if len(concrete) == 1:
        return _coerce(value, concrete[0], where)
    for option in concrete:
        with suppress(ConfigError):
            return _coerce(value, option, where)
    raise ConfigError(f"{where}: got {value!r}, want {' or '.join(map(_words, concrete))}.")


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float:
        value = _number(value) if isinstance(value, str) else value
        _require(isinstance(value, int | float) and not isinstance(value, bool), where, value, _words(hint))
        return float(value)
    if hint is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        _require(whole and not isinstance(value, bool), where, value, _words(hint))
        return int(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # what YAML read as a number, such as the layers -4
    if hint in (bool, str):
        _require(isinstance(value, hint), where, value, _words(hint))
    return value


def _words(hint: Any) -> str:
    """What a person is to give for a type."""
    known = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return known.get(hint) or ", ".join(o for o in typing.get_args(hint) if isinstance(o, str)) or "a list"


def _require(ok: bool, where: str, value: Any, want: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: got {value!r}, want {want}.")
