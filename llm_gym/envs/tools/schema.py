"""Tools and their schemas: made from Python functions, and arguments checked against them."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llm_gym.envs.tools.parsers.literals import loads
from llm_gym.errors import ConfigError, suggestion
from llm_gym.tokenizer import well_formed

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    schema: dict[str, Any]
    """What the model is shown: `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    run: Callable[..., Any]
    """Called with the arguments by name; what it returns is shown to the model."""
    timed: bool = False
    """Whether `run` keeps a deadline of its own; where all do, they run in the thread of who steps."""

    @property
    def name(self) -> str:
        """The name that calls use."""
        return str(self.schema["function"]["name"])

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        found: dict[str, Any] = self.schema["function"].get("parameters") or {}
        return found

    @classmethod
    def of(cls, tool: Tool | Callable[..., Any]) -> Tool:
        """A tool as it is, or one made from a function's signature and docstring.

        Raises:
            ConfigError: an argument without a type, or of a type that JSON has no word for.
        """
        return tool if isinstance(tool, Tool) else cls(function_schema(tool), tool)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a Python function: types from its signature, words from its docstring.

    The first paragraph of the docstring describes the function, its `Args:` section the arguments.
    transformers' `get_json_schema` does the same, but imports torch and refuses arguments that are not described.

    Raises:
        ConfigError: an argument without a type, or of a type that JSON has no word for.
    """
    name = getattr(function, "__name__", type(function).__name__)
    summary, notes = _docstring(function)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(f"tools: argument {argument!r} of {name}() needs a type, such as {argument}: str.")
        properties[argument] = type_schema(hints[argument], f"argument {argument!r} of {name}()")
        if argument in notes:
            properties[argument]["description"] = notes[argument]
        if parameter.default is parameter.empty:
            required.append(argument)
        elif parameter.default is not None:
            properties[argument]["default"] = parameter.default
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": parameters}}


_TYPES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}


def type_schema(hint: Any, what: str) -> dict[str, Any]:
    """The JSON schema of a type hint; `what` names the argument in the error.

    Raises:
        ConfigError: JSON has no word for it.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _TYPES:
        return dict(_TYPES[hint])
    if origin is Literal:
        return {"enum": list(inner), **_one_type(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [type_schema(option, what) for option in inner]}
    if origin is list:
        return {"type": "array", "items": type_schema(inner[0], what)}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": type_schema(inner[1], what)}
    valid = "str, int, float, bool, list[...], dict[str, ...], Literal[...], or a union of these"
    raise ConfigError(f"tools: {what} has the type {hint!r}, want {valid}.")


def check_arguments(arguments: Mapping[str, Any], schema: Schema) -> tuple[dict[str, Any], list[str]]:
    """The arguments with safe conversions made, and everything that is wrong with them, in words for the model.

    Converted are only values that have one meaning: "3" where an integer is wanted, 3.0 for 3, "true" for true, a
    list or object given as JSON text. Nothing becomes a string.
    """
    return _object(dict(arguments), {"type": "object", **schema}, "")


EXAMPLES: Mapping[str, Any] = {"string": "6*7", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}


def example_arguments(schema: Schema) -> dict[str, Any]:
    """Required arguments of the right types, for a schema of plain types."""
    properties: Mapping[str, Any] = schema.get("properties") or {}
    return {name: _example(properties.get(name, {})) for name in schema.get("required") or ()}


def _example(schema: Any) -> Any:
    if not isinstance(schema, Mapping):  # `true`: anything
        return None
    if schema.get("enum"):
        return schema["enum"][0]
    kinds = schema.get("type")
    return EXAMPLES.get(kinds[0] if isinstance(kinds, list) and kinds else str(kinds), schema.get("default"))


def _object(value: dict[str, Any], schema: Schema, path: str) -> tuple[dict[str, Any], list[str]]:
    properties: Mapping[str, Any] = schema.get("properties") or {}
    extra = schema.get("additionalProperties", not properties and not path)
    wrong = [f"the argument {_at(path, name)} is missing" for name in schema.get("required") or () if name not in value]
    checked = {}
    for name, item in value.items():
        if name not in properties and extra is False:
            wrong.append(_unknown(name, properties, path))
            continue
        rule = properties.get(name, extra if isinstance(extra, Mapping) else {})
        checked[name], problems = _value(item, rule, _at(path, name))
        wrong += problems
    return checked, wrong


def _value(value: Any, schema: Any, path: str) -> tuple[Any, list[str]]:
    """One value, converted if that is safe, and what is wrong with it."""
    value = well_formed(value) if isinstance(value, str) else value
    if not isinstance(schema, Mapping):
        return value, []
    if value is None and schema.get("nullable"):
        return value, []
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return _any(value, options, path)
    kinds = schema.get("type") or ()
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    known = tuple(kind for kind in kinds if kind in _CHECKS)
    if known and not any(_CHECKS[kind](value) for kind in known):
        value, ok = _converted(value, known)
        if not ok:
            return value, [f"the argument {path} must be {_list(known)}, got {_shown(value)}"]
    wrong = [f"the argument {path} {problem}" for problem in _limits(value, schema)]
    if isinstance(value, dict):
        value, problems = _object(value, {"additionalProperties": True, **schema}, path)
        return value, wrong + problems
    if isinstance(value, list):
        items = [_value(item, schema.get("items"), f"{path}[{i}]") for i, item in enumerate(value)]
        return [item for item, _ in items], wrong + [problem for _, problems in items for problem in problems]
    return value, wrong


def _any(value: Any, options: Any, path: str) -> tuple[Any, list[str]]:
    """The first option that the value meets as it is, else the first that it can be converted to."""
    tried = [_value(value, option, path) for option in options]
    fits = [found for found, wrong in tried if not wrong]
    same = [found for found in fits if type(found) is type(value) and found == value]
    if fits:
        return (same or fits)[0], []
    return value, tried[0][1] if len(tried) == 1 else [f"the argument {path} must be one of: {_options(options)}"]


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def _converted(value: Any, kinds: tuple[str, ...]) -> tuple[Any, bool]:
    """The value as one of `kinds`, and whether that could be done."""
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return int(value), True
    if isinstance(value, str) and "string" not in kinds:
        text = {"True": "true", "False": "false", "None": "null"}.get(value.strip(), value)
        try:
            read = loads(text)
        except ValueError:
            return value, False
        if any(_CHECKS[kind](read) for kind in kinds):
            return read, True
        if isinstance(read, float) and "integer" in kinds and read.is_integer():
            return int(read), True
    return value, False


_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda v, limit: not _number(v) or v >= limit, "must be at least"),
    "maximum": (lambda v, limit: not _number(v) or v <= limit, "must be at most"),
    "exclusiveMinimum": (lambda v, limit: not _number(v) or v > limit, "must be more than"),
    "exclusiveMaximum": (lambda v, limit: not _number(v) or v < limit, "must be less than"),
    "minLength": (lambda v, limit: not isinstance(v, str) or len(v) >= limit, "must have a length of at least"),
    "maxLength": (lambda v, limit: not isinstance(v, str) or len(v) <= limit, "must have a length of at most"),
    "minItems": (lambda v, limit: not isinstance(v, list) or len(v) >= limit, "must have at least as many items as"),
    "maxItems": (lambda v, limit: not isinstance(v, list) or len(v) <= limit, "must have at most as many items as"),
    "enum": (lambda v, valid: v in valid, "must be one of"),
    "const": (lambda v, valid: v == valid, "must be"),
}


def _limits(value: Any, schema: Schema) -> list[str]:
    """The limits of the schema that the value breaks; keywords beyond these are left to the tool."""
    return [
        f"{words} {_shown(schema[key])}, got {_shown(value)}"
        for key, (holds, words) in _LIMITS.items()
        if key in schema and not isinstance(schema[key], bool) and not holds(value, schema[key])
    ]


def _number(value: Any) -> bool:
    return _CHECKS["number"](value)


def _unknown(name: str, properties: Mapping[str, Any], path: str) -> str:
    hint = suggestion(name, properties) or f"valid: {', '.join(properties) or 'none'}"
    return f"there is no argument {_at(path, name)} ({hint})"


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else repr(name)


_ARTICLES = {"array": "an array", "object": "an object", "integer": "an integer", "null": "null"}


def _list(kinds: tuple[str, ...]) -> str:
    return " or ".join(_ARTICLES.get(kind, f"a {kind}") for kind in kinds)


def _options(options: Any) -> str:
    return "; ".join(json.dumps(option)[:80] for option in options)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."


def _one_type(values: tuple[Any, ...]) -> dict[str, Any]:
    """`{"type": ...}` if all values are of one, else nothing."""
    kinds = {json.dumps(_TYPES.get(type(value), {})) for value in values}
    return json.loads(kinds.pop()) if len(kinds) == 1 else {}


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """A docstring's first paragraph, and what its `Args:` section says of each argument."""
    text = inspect.getdoc(function) or ""
    summary = " ".join(text.partition("\n\n")[0].split())
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.M)
    notes: dict[str, str] = {}
    for entry in re.split(r"^ {4}(?=\w+ ?(?:\(.*?\))?:)", section[1], flags=re.M) if section else ():
        name, _, note = entry.partition(":")
        notes[name.partition("(")[0].strip()] = " ".join(note.split())
    return summary, {name: note for name, note in notes.items() if name}
