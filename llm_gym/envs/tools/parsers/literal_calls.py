"""Tool calls that look like code: a Python list of calls, Gemma 4's `call:f{...}`, a fenced block of Python."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from llm_gym.envs.tools.parsers.calls import MOST_CALLS, Schemas, ToolCall
from llm_gym.envs.tools.parsers.literals import LiteralError, Literals


@dataclass(frozen=True)
class Pythonic:
    """`[f(a=1), g(b="x")]`: as the whole reply (Llama 3.2 and 4), on a line of its own, or between two markers.

    Without brackets too, between markers or where the whole reply is calls of tools that there are.
    """

    marks: ClassVar[Mapping[str, str]] = {
        "<|tool_call_start|>": "<|tool_call_end|>",  # LFM2
        "<|python_start|>": "<|python_end|>",  # Llama 4
        "```tool_code": "```",  # Gemma 3
    }
    """What opens calls, and what closes them."""
    marked: bool = False
    """Whether `write` puts LFM2's markers."""

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        opens = _opens(tuple(schemas))
        found: list[ToolCall] = []
        at = 0
        while len(found) < MOST_CALLS and (opened := opens.search(text, at)):
            calls = self._list(text, opened, schemas)
            at = max(opened.end(), calls[-1].stop)
            if opened["alone"] is None or not calls[0].error or text.rstrip().endswith(")"):
                found += calls  # else a sentence that begins with the name of a tool
        return found[:MOST_CALLS]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them."""
        written = ", ".join(
            f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})" for call in calls
        )
        return f"<|tool_call_start|>[{written}]<|tool_call_end|>" if self.marked else f"[{written}]"

    def _list(self, text: str, opened: re.Match[str], schemas: Schemas) -> list[ToolCall]:
        """The calls of one list; one that says what is wrong if it cannot be read."""
        closing = self.marks.get(opened["mark"] or "", "")
        literals, calls, name = Literals(text, opened.end()), list[tuple[str, dict[str, Any]]](), ""
        try:
            bracket = literals.skip("[")
            while not (literals.skip("]") if bracket else calls and literals.ends(closing)):
                if bracket and calls:
                    literals.want(",", "]")
                elif calls and not literals.skip(","):
                    literals.skip(";")  # or nothing: calls on lines of their own
                name = literals.word()
                literals.want("(")
                calls.append((name, literals.pairs(")", "=")))
            if not calls:
                raise literals.error("a call", -1)
        except LiteralError as error:
            closed = text.find(closing, opened.end()) if closing else -1
            stop = closed + len(closing) if closed >= 0 else len(text)
            if name not in schemas:
                name = next((one for one in schemas if f"{one}(" in text[opened.end() : stop]), name)
            why = f'The call cannot be read: {error}; the form is [name(argument="value")].'
            return [ToolCall(name, {}, opened.start(), stop, why)]
        if bracket and closing:
            literals.skip(closing)
        return [ToolCall(name, arguments, opened.start(), literals.at) for name, arguments in calls]


@lru_cache(maxsize=256)
def _opens(tools: tuple[str, ...]) -> re.Pattern[str]:
    """What a list of calls begins with: a marker, a bracket in front of a call, or a call of one of these tools."""
    known = f"(?:{'|'.join(map(re.escape, tools)) or '(?!)'})"
    return re.compile(
        rf"(?P<mark>{'|'.join(map(re.escape, Pythonic.marks))})"
        rf"|^[^\S\n]{{0,9}}(?=\[\s{{0,9}}{known}\()"
        rf"|\A\s*(?:(?=\[\s*[^\W\d][\w.-]*\()|(?P<alone>)(?={known}\())",
        re.M,
    )


@dataclass(frozen=True)
class Gemma:
    """`<|tool_call>call:f{a:<|"|>text<|"|>,n:1}<tool_call|>`, and as FunctionGemma has it: `<start_function_call>`."""

    opens = re.compile(r"(?:<\|tool_call>|<start_function_call>)\s*call:(?P<name>[\w.-]{1,200})")
    closes = re.compile(r"<tool_call\|>|<end_function_call>")

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        found: list[ToolCall] = []
        at = 0
        while len(found) < MOST_CALLS and (opened := self.opens.search(text, at)):
            literals = Literals(text, opened.end())
            try:
                literals.want("{")
                arguments = literals.pairs("}", ":")
                literals.skip("")
                closed = self.closes.match(text, literals.at)
                stop = closed.end() if closed else literals.at
                found.append(ToolCall(opened["name"], arguments, opened.start(), stop))
            except LiteralError as error:
                closed = self.closes.search(text, opened.end())
                stop = closed.end() if closed else len(text)
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

    opens = re.compile(
        r"^[^\S\n]{0,9}```[^\S\n]{0,9}(?:python\d?|py\d?|ipython|tool_code|tool_call)\b(?P<rest>[^\n]*)\n?", re.M | re.I
    )
    closes = re.compile(r"^[^\S\n]{0,9}```[^\S\n]*$", re.M)

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        name, key = code_tool(schemas)
        found: list[ToolCall] = []
        at = 0
        while len(found) < MOST_CALLS and (opened := self.opens.search(text, at)):
            at = opened.end()
            if opened["rest"].strip():
                error = "The call cannot be read: the code must start on the line below ```python."
                found.append(ToolCall(name, {}, opened.start(), at, error))
                continue
            closed = self.closes.search(text, at)
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
        only = (schema.get("properties") or {}).get(required[0]) if len(required) == 1 else None
        if isinstance(only, Mapping) and only.get("type") == "string":
            return name, required[0]
    return "", ""


def _key(key: str) -> str:
    return key if re.fullmatch(r"[^\W\d][\w.-]*", key) else f'<|"|>{key}<|"|>'
