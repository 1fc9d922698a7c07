"""What is said over a connection: to servers of ours, which tell all of an episode, and to others by their schemas."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, Protocol

from llm_gym.core import Messages, StopReason
from llm_gym.env import Reply
from llm_gym.envs.adapters.connection import Data, Refused
from llm_gym.envs.tools.parsers.formats import Format
from llm_gym.envs.tools.parsers.literals import loads
from llm_gym.errors import ConfigError, LLMGymError, unknown

FORMAT = {"format": 0.1}
"""The weight of replies that are no action, as of a `ToolEnv`'s refused calls."""
COMMON = ("done", "reward", "metadata", "truncated")
"""Fields of actions and observations of OpenEnv that say nothing to a model."""
PROTOCOL = 1
"""What our own server must speak."""


class Dialect(Protocol):
    """How an environment is played over a connection, and what is known of it."""

    shared: bool
    """Whether sessions have names, so that one connection carries them all."""
    reward_names: tuple[str, ...] | None
    reward_weights: Mapping[str, float]
    num_tasks: int | None
    fixed_start: bool
    tools: Sequence[Data]
    limits: Mapping[str, Any]
    """Arguments of a `TextEnv` where the user gives none."""

    def reset(self, seed: int, task: int | None, form: Format | None) -> Data:
        """The data of a reset."""

    def opened(self, data: Data) -> Messages:
        """The first messages, of the answer to a reset."""

    def action(self, text: str, cut: bool, thinking: str) -> Data | Reply:
        """The data of a step, or what answers a reply that is no action."""

    def replied(self, data: Data) -> Reply:
        """What a step's answer says."""

    def refused(self, error: Refused) -> Reply:
        """What answers an action that the server finds wrong."""


class Ours(Dialect):
    """A server of this package, which has told `own` of its environment."""

    shared = True

    def __init__(self, own: Data, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name}: got {value!r:.80}, but {own['env']} there is played by text as it is.")
        if own["protocol"] != PROTOCOL:
            raise ConfigError(f"url: the server speaks protocol {own['protocol']} of llm_gym, want {PROTOCOL}.")
        names = own["reward_names"]
        self.reward_names = None if names is None else tuple(names)
        self.reward_weights, self.num_tasks = own["reward_weights"], own["num_tasks"]
        self.fixed_start, self.tools, self.limits = own["fixed_start"], own["tools"], own["limits"]

    def reset(self, seed: int, task: int | None, form: Format | None) -> Data:
        """As in `Dialect`."""
        return {"seed": seed, "task": task, "tool_format": form.name if form else None}

    def opened(self, data: Data) -> Messages:
        """As in `Dialect`."""
        found: Messages = data["observation"]["messages"]
        return found

    def action(self, text: str, cut: bool, thinking: str) -> Data | Reply:
        """As in `Dialect`."""
        return {"text": text, **({"cut": True} if cut else {}), **({"thinking": thinking} if thinking else {})}

    def replied(self, data: Data) -> Reply:
        """As in `Dialect`."""
        seen = data["observation"]
        stop = StopReason(seen["stop_reason"]) if data["done"] else None
        rewrite, error = seen.get("rewrite"), seen.get("error", "")
        return Reply(seen["messages"], seen["parts"], data["done"], stop, rewrite, error)

    def refused(self, error: Refused) -> Reply:
        """As in `Dialect`."""
        raise LLMGymError(str(error)) from error


class Theirs(Dialect):
    """Any other server of OpenEnv's protocol: actions and observations as its schema has them."""

    shared = False
    reward_names = ("reward", "format")
    reward_weights: Mapping[str, float] = FORMAT
    num_tasks = None
    fixed_start = False
    tools: Sequence[Data] = ()
    limits: Mapping[str, Any] = {}

    def __init__(self, schema: Data, action: str | None, prompt: str | None, reset: Mapping[str, Any] | None) -> None:
        self._fields = _fields(schema["action"])
        must = [name for name in schema["action"].get("required", ()) if name in self._fields]
        texts = [name for name, rule in self._fields.items() if "string" in _types(rule)]
        if action is not None and action not in self._fields:
            raise ConfigError(unknown("action", action, self._fields))
        only = [name for name in (must or texts) if name in texts] if len(must or texts) == 1 else []
        self._field = action or next(iter(only), None)
        seen = {**_fields(schema.get("observation") or {}), **_fields(schema.get("reset_observation") or {})}
        for name in [field for _, field, _, _ in Formatter().parse(prompt or "") if field is not None]:
            if seen and name not in seen:
                raise ConfigError(unknown("prompt", name, seen))
        self._prompt, self._reset = prompt, dict(reset or {})
        wanted = {name: rule.get("description") or "/".join(_types(rule)) for name, rule in self._fields.items()}
        self._form = f"Reply with one JSON object: {json.dumps(wanted)}"

    def reset(self, seed: int, task: int | None, form: Format | None) -> Data:
        """As in `Dialect`."""
        return {"seed": seed, **({} if task is None else {"index": task}), **self._reset}

    def opened(self, data: Data) -> Messages:
        """As in `Dialect`."""
        messages = self._told(data)
        if self._field is None:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{self._form}".lstrip()}
        return messages

    def action(self, text: str, cut: bool, thinking: str) -> Data | Reply:
        """As in `Dialect`."""
        if self._field is not None:
            return {self._field: text}
        start, end = text.find("{"), text.rfind("}")
        try:
            found = loads(text[start : end + 1])
        except ValueError:
            found = None
        return found if isinstance(found, dict) else self._no_action(self._form)

    def replied(self, data: Data) -> Reply:
        """As in `Dialect`."""
        seen, done = data.get("observation") or {}, bool(data.get("done"))
        reward = {"reward": data.get("reward") or 0.0, "format": 0.0}
        cut = done and bool(seen.get("truncated") or (data.get("metadata") or {}).get("truncated"))
        return Reply([] if done else self._told(data), reward, done, StopReason.TURN_LIMIT if cut else None)

    def refused(self, error: Refused) -> Reply:
        """As in `Dialect`."""
        wrong = [f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg')}" for one in error.data.get("errors", ())]
        return self._no_action("; ".join(wrong) or str(error))

    def _no_action(self, words: str) -> Reply:
        return Reply([{"role": "user", "content": f"Error: {words}"}], {"reward": 0.0, "format": -1.0})

    def _told(self, data: Data) -> Messages:
        """What the model is shown of an observation."""
        seen = {name: value for name, value in (data.get("observation") or {}).items() if name not in COMMON}
        messages = seen.get("messages")
        if self._prompt is not None:
            text = self._prompt.format_map(defaultdict(str, {name: _text(value) for name, value in seen.items()}))
        elif isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
            return [dict(message) for message in messages]
        else:
            filled = {name: _text(value) for name, value in seen.items() if value not in (None, "", [], {})}
            texts = [name for name in filled if isinstance(seen[name], str)]
            one = texts if len(texts) == 1 and len(filled) == 1 else []
            text = filled[one[0]] if one else "\n".join(f"{name}: {value}" for name, value in filled.items())
        return [{"role": "user", "content": text}]


def _fields(schema: Data) -> dict[str, Data]:
    return {name: rule for name, rule in (schema.get("properties") or {}).items() if name not in COMMON}


def _types(rule: Data) -> list[str]:
    """The JSON types that a field may have."""
    rules = [rule, *(rule.get("anyOf") or ())]
    return [str(each["type"]) for each in rules if "type" in each]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
