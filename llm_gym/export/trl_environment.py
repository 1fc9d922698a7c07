"""TRL's `environment_factory`: TRL plays, an environment with tools answers (https://github.com/huggingface/trl, 1.16).

TRL renders the chat, reads the calls, and knows the tools as methods: by name, type hints and docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature
from typing import Any

from llm_gym import envs
from llm_gym.envs.tools import Tool, ToolEnv
from llm_gym.errors import ConfigError
from llm_gym.export.trl_bridge import Bridge

KINDS = {"string": str, "integer": int, "number": float, "boolean": bool}
"""The types of arguments that TRL's schemas and ours have both."""
ROOM = {"max_tokens": 1 << 20, "max_context": 1 << 20}
"""Tokens are TRL's to count."""


def trl_environment(env_id: str, /, **env_args: Any) -> type[Bridge]:
    """`GRPOTrainer(environment_factory=...)`, with a column `seed` in the data set and `reward_funcs=trl_final`.

    `trl_final` is what the last reply earned, and `get_reward()` what the calls did; the return is both.

    Args:
        env_id: an environment with tools (a `ToolEnv`).
        env_args: its keyword arguments. Limits of tokens are the trainer's.

    Raises:
        ConfigError: an environment without tools, or a tool that TRL cannot be told of.
    """
    made = envs.make(env_id, **env_args)
    try:
        inner = made.unwrapped
        if not isinstance(inner, ToolEnv):
            raise ConfigError(f"env_id: {env_id} has no tools for TRL to call; trl_rollout_func plays it.")
        methods = {tool.name: _method(tool) for tool in inner.tools.values()}
        name = type(inner).__name__
    finally:
        made.close()
    make = partial(envs.make, env_id, **{**ROOM, **env_args})
    return type(name, (Bridge,), {"__doc__": f"{env_id} as TRL plays it.", "_make": staticmethod(make), **methods})


def trl_final(
    completions: Sequence[Sequence[Mapping[str, Any]]], environments: Sequence[Bridge], **others: Any
) -> list[float | None]:
    """`GRPOTrainer(reward_funcs=...)` for `trl_environment`: what the last replies earned; None for failures."""
    return [environment._end(chat) for environment, chat in zip(environments, completions, strict=True)]


def _method(tool: Tool) -> Callable[..., str]:
    """A method that calls the tool, with the signature and the docstring that TRL makes its schema of.

    Raises:
        ConfigError: its name or an argument is one that TRL has no way to write.
    """
    name, schema, summary = tool.name, tool.parameters, tool.schema["function"].get("description") or tool.name
    if name.startswith("_") or name in ("reset", "get_reward") or not name.isidentifier():
        raise ConfigError(f"tools: TRL cannot call a tool {name!r}, want a public method's name.")
    given = [_parameter(name, argument, rule, schema) for argument, rule in (schema.get("properties") or {}).items()]

    def method(self: Bridge, **arguments: Any) -> str:
        return self._call(name, arguments)

    notes = [f"    {each.name}: {schema['properties'][each.name].get('description') or each.name}" for each in given]
    method.__name__, method.__doc__ = name, "\n".join([f"{summary}\n", "Args:", *notes] if notes else [summary])
    itself = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = Signature([itself, *given], return_annotation=str)  # type: ignore[attr-defined]
    method.__annotations__ = {each.name: each.annotation for each in given} | {"return": str}
    return method


def _parameter(tool: str, name: str, rule: Any, schema: Mapping[str, Any]) -> Parameter:
    """An argument of a tool as a parameter.

    Raises:
        ConfigError: its type is not one of `KINDS`.
    """
    kind = KINDS.get(str(rule.get("type")) if isinstance(rule, Mapping) else "")
    if kind is None or not name.isidentifier():
        raise ConfigError(
            f"tools: argument {name!r} of {tool}() is {rule}, and TRL is told of {', '.join(KINDS)} alone."
        )
    default = Parameter.empty if name in schema.get("required", ()) else rule.get("default")
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
