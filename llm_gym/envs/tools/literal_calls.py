"""Tool calls that look like code: a Python list of calls, Gemma 4's `call:f{...}`, a fenced block of Python."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_gym.envs.tools.calls import MOST_CALLS, Schemas, ToolCall
from llm_gym.envs.tools.literals import LiteralError, Literals


@dataclass(frozen=True)
class Pythonic:
    """`[f(a=1), g(b="x")]`, as the whole reply (Llama 3.2 and 4) or between two markers (LFM2)."""

    begin = "<|tool_call_start|>"
    end = "<|tool_call_end|>"
    bare = re.compile(r"\s*(?:<\|python_start\|>\s*)?\[\s*[^\W\d][\w.-]*\(")
    marked: bool = False
    """Whether `write` puts the markers."""

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        if opened := self.bare.match(text):
            return self._list(text, 0, text.index("[", opened.start()), len(text))[:MOST_CALLS]
        found: list[ToolCall] = []
        at = text.find(self.begin)
        while at >= 0 and len(found) < MOST_CALLS:
            closing = text.find(self.end, at)
            stop = closing + len(self.end) if closing >= 0 else len(text)
            found += self._list(text, at, at + len(self.begin), stop)
            at = text.find(self.begin, max(stop, found[-1].stop))
        return found[:MOST_CALLS]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them."""
        written = ", ".join(
            f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})" for call in calls
        )
        return f"{self.begin}[{written}]{self.end}" if self.marked else f"[{written}]"

    def _list(self, text: str, start: int, at: int, stop: int) -> list[ToolCall]:
        """The calls of one list; one that says what is wrong if it cannot be read."""
        literals, calls, name = Literals(text, at), list[tuple[str, dict[str, Any]]](), ""
        try:
            literals.want("[")
            while not literals.skip("]"):
                if calls:
                    literals.want(",", "]")
                name = literals.word()
                literals.want("(")
                calls.append((name, literals.pairs(")", "=")))
        except LiteralError as error:
            form = 'the form is [name(argument="value")]'
            return [ToolCall(name, {}, start, stop, f"The call cannot be read: {error}; {form}.")]
        stop = literals.at + len(self.end) if literals.skip(self.end) else literals.at
        return [ToolCall(name, arguments, start, stop) for name, arguments in calls]


@dataclass(frozen=True)
class Gemma:
    """`<|tool_call>call:f{a:<|"|>text<|"|>,n:1}<tool_call|>`."""

    opens = re.compile(r"<\|tool_call>\s*call:(?P<name>[\w.-]{1,200})")
    closes = "<tool_call|>"

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        found: list[ToolCall] = []
        at = 0
        while len(found) < MOST_CALLS and (opened := self.opens.search(text, at)):
            literals = Literals(text, opened.end())
            try:
                literals.want("{")
                arguments = literals.pairs("}", ":")
                literals.skip(self.closes)
                found.append(ToolCall(opened["name"], arguments, opened.start(), literals.at))
            except LiteralError as error:
                closing = text.find(self.closes, opened.end())
                stop = closing + len(self.closes) if closing >= 0 else len(text)
                found.append(ToolCall(opened["name"], {}, opened.start(), stop, f"The call cannot be read: {error}."))
            at = max(found[-1].stop, opened.end())
        return found

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them."""
        return "".join(f"<|tool_call>call:{call.name}{self._written(call.arguments)}<tool_call|>" for call in calls)

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f'<|"|>{value}<|"|>'
        if isinstance(value, dict):
            return "{" + ",".join(f"{_key(key)}:{self._written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(self._written, value)) + "]"
        return json.dumps(value)


@dataclass(frozen=True)
class Fenced:
    """A fenced block of Python: the argument of the first tool that takes one string."""

    opens = re.compile(r"^[^\S\n]{0,9}```(?:python|py|tool_code|tool_call)[^\S\n]*\n", re.M)
    closes = re.compile(r"^[^\S\n]{0,9}```[^\S\n]*$", re.M)

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        name, key = code_tool(schemas)
        found: list[ToolCall] = []
        at = 0
        while len(found) < MOST_CALLS and (opened := self.opens.search(text, at)):
            closed = self.closes.search(text, opened.end())
            if closed is None:
                error = "The call cannot be read: the block of code is not closed by a line of ```."
                return [*found, ToolCall(name, {}, opened.start(), len(text), error)]
            code = text[opened.end() : max(opened.end(), closed.start() - 1)]
            found.append(ToolCall(name, {key: code}, opened.start(), closed.end()))
            at = closed.end()
        return found

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them; each has one argument, the code."""
        return "\n".join(f"```python\n{next(iter(call.arguments.values()))}\n```" for call in calls)


def code_tool(schemas: Schemas) -> tuple[str, str]:
    """Name and argument of the first tool that requires one string and nothing else; empty if there is none."""
    for name, schema in schemas.items():
        required = schema.get("required") or []
        if len(required) == 1 and schema.get("properties", {}).get(required[0], {}).get("type") == "string":
            return name, required[0]
    return "", ""


def _key(key: str) -> str:
    return key if re.fullmatch(r"[^\W\d][\w.-]*", key) else f'<|"|>{key}<|"|>'
