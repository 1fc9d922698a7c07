"""One typed, frozen configuration: dataclasses in Python, YAML on disk, `a.b=c` on the command line.

`load` builds any frozen dataclass (nested ones included) from a mapping; a key that does not exist or
a value of the wrong type is refused with one sentence before anything else happens. A dataclass that is
`checked` refuses it with the same sentence when it is written out in Python.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeVar

import yaml

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.bounds import check_bounds
from llm_gym.harness.registry import import_path

T = TypeVar("T")
PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str),
    (os.PathLike, str),
    (Integral, int),
    (Real, float),
)
"""Kinds of values -> what YAML has for them: paths, and the numbers of NumPy."""
SECRET = "secret"
"""In the metadata of a field that holds a mapping: its keys that are never written down."""
GIVEN = "given in Python: "
"""Begins what stands in YAML for an object that no import finds again."""


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


def checked(section: str = "") -> Callable[[type[T]], type[T]]:
    """Makes a dataclass as careful in Python as in YAML: the same values are taken, and refused with one sentence.

    `TrainConfig(loss={"name": "gspo"})` holds a `LossConfig`; `TrainConfig(step=3)` names `steps`. It stands above
    `@dataclass`; what it has looked at, `__post_init__` finds in the types that the fields state, within their bounds.

    Args:
        section: where the dataclass stands in the configuration, for the sentence; "" at the top.
    """
    where = f"{section}." if section else ""

    def decorate(cls: type[T]) -> type[T]:
        make: Callable[..., None] = cls.__init__
        names = _fields(cls)

        @wraps(make)
        def __init__(self: T, *args: Any, **given: Any) -> None:
            named = dict(zip(names, args, strict=False))
            if len(named) < len(args) or named.keys() & given.keys():
                make(self, *args, **given)  # raises Python's own TypeError
            make(self, **_values(cls, _with_preset(cls, named | given), where))

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "", over: T | None = None) -> T:
    """A dataclass from a mapping, nested ones included; what the mapping leaves out is as in `over`, or default.

    Raises:
        ConfigError: names the key, the value received and the nearest valid one.
    """
    base = {} if over is None else {name: getattr(over, name) for name in _fields(cls)}
    try:
        return cls(**(base | _values(cls, data, where, base)))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """The plain form of a configuration, ready for YAML or JSON: complete, but for a field's keys that are `SECRET`."""
    given = {f.name: (getattr(config, f.name), f.metadata.get(SECRET, ())) for f in dataclasses.fields(config)}
    return {
        name: _plain({key: held for key, held in value.items() if key not in secret} if secret else value)
        for name, (value, secret) in given.items()
    }


def dump(config: Any) -> str:
    """YAML that `load` reads back to an equal configuration, but for what is `SECRET`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def check_complete(config: Any) -> None:
    """Looks whether a configuration that was read from YAML lacks an object that it had in Python.

    Raises:
        ConfigError: it does; names the setting and the object.
    """
    for name, text in _strings(config):
        if text.startswith(GIVEN):
            raise ConfigError(
                f"{name}: the run was given {text.removeprefix(GIVEN)} in Python, of which config.yaml keeps only the "
                "name; pass it again, or put a function into a module and pass package.module:function."
            )


def _values(cls: type, data: Mapping[str, Any], where: str, over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Given values of a dataclass's fields, in the types that the fields state and within their bounds.

    Args:
        cls: the dataclass.
        data: field -> value.
        where: what the fields' names follow in sentences, such as `loss.`.
        over: sections that a section given in part is laid over; None: the defaults.

    Raises:
        ConfigError: an unknown field, or a value that cannot be.
    """
    hints, names = _hints(cls), _fields(cls)
    gone: Mapping[str, tuple[Any, str]] = getattr(cls, "gone", {})
    data = {key: value for key, value in data.items() if key not in gone or value != gone[key][0]}
    for key in data:
        if key in gone:
            raise ConfigError(f"{where}{key}: it is no setting any more: {gone[key][1]}.")
        if key not in names:
            raise ConfigError(unknown("configuration key", f"{where}{key}", [f"{where}{name}" for name in names]))
    base = over or _section_defaults(cls)
    values = {key: _coerce(value, hints[key], f"{where}{key}", base.get(key)) for key, value in data.items()}
    check_bounds(cls, values, where)
    return values


def _fields(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    """A value as YAML has it; an object of Python by its import path, or marked where no import finds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | bytes | date):
        return value
    for kind, plain in PLAIN:
        if isinstance(value, kind):
            return plain(value)
    path = import_path(value)
    return path if path and not path.startswith("__main__:") else f"{GIVEN}{_title(value)}"


def _title(thing: Any) -> str:
    """`module.name` of a function or class; of anything else, that of its class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{'' if named is thing else 'an object of '}{named.__module__}.{named.__qualname__}"


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a configuration, by its dotted name."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, str):
        yield name, value
    elif dataclasses.is_dataclass(value):
        inner = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, tuple | list):
        inner = enumerate(value)
    for key, item in inner:
        yield from _strings(item, f"{name}.{key}" if name else str(key))


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping gives a key twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.MarkedYAMLError(problem=f"it gives {twice!r} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What a YAML file of settings holds.

    Raises:
        yaml.YAMLError: it is no YAML, or gives a key twice.
    """
    return yaml.load(text, _Loader)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = read_yaml(file.read_text(encoding="utf-8")) or {}
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
        return {_coerce_scalar(key, args[0], where): item for key, item in value.items()}
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
        _require(isinstance(value, Real) and not isinstance(value, bool), where, value, _words(hint))
        return float(value)
    if hint is int:
        whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
        _require(whole and not isinstance(value, bool), where, value, _words(hint))
        return int(value)
    if hint is str and isinstance(value, int | os.PathLike) and not isinstance(value, bool):
        return str(value)  # what YAML read as a number, such as the layers -4; or a path, in Python
    if hint is str and isinstance(value, FunctionType | type):
        path = import_path(value)
        _require(path is not None, where, value, "a function at the top of a module, which an import finds")
        return path
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
