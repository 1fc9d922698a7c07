"""Tool calls written as JSON behind a marker: Hermes and Qwen, Llama 3, Mistral, gpt-oss, DeepSeek, Kimi."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_gym.envs.tools.parsers.calls import MOST_CALLS, Schemas, ToolCall
from llm_gym.envs.tools.parsers.literals import decode, loads

WANTED = '{"name": ..., "arguments": {...}}'
NAME = r"(?P<name>[\w.-]{1,200})"
_SPACE = re.compile(r"\s*")
_JOINT = re.compile(r"\s*[,;]?\s*")
"""What may stand between two calls behind one marker."""
_NAMED = re.compile(
    r'\{\s{0,9}(?:"type"\s{0,9}:\s{0,9}"function"\s{0,9},\s{0,9})?"(?:name|function)"\s{0,9}:\s{0,9}"' + NAME + '"'
)


@dataclass(frozen=True)
class JsonCalls:
    """Reads and writes calls of one JSON format.

    Args:
        opens: what stands before the JSON; a group `name` where the name is not in the JSON, `id` likewise.
        closes: what may stand behind it.
        pattern: how a call is written, with `{name}` (JSON text), `{tool}` (the bare name) and `{arguments}`.
        joint: what is written between two calls.
        bare: where there is no marker, JSON of another form is ordinary text, unless it names a tool.
    """

    opens: re.Pattern[str]
    closes: re.Pattern[str]
    pattern: str
    joint: str = "\n"
    bare: bool = False

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        found: list[ToolCall] = []
        at = 0
        for _ in range(MOST_CALLS):
            marker = self.opens.search(text, at)
            if marker is None:
                break
            calls = list(self._at(text, marker, schemas))
            at = max([marker.end() + 1, *(call.stop for call in calls)])  # a bare call's marker is empty
            found += calls
        return found[:MOST_CALLS]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them."""
        return self.joint.join(
            self.pattern.replace("{tool}", call.name)
            .replace("{name}", json.dumps(call.name, ensure_ascii=False))
            .replace("{arguments}", json.dumps(call.arguments, ensure_ascii=False))
            for call in calls
        )

    def _at(self, text: str, marker: re.Match[str], schemas: Schemas) -> Iterator[ToolCall]:
        """The calls behind one marker: several where the JSON is a list, or where more JSON follows."""
        groups = marker.groupdict()
        name, identity = groups.get("name") or "", groups.get("id") or ""
        bare = self.bare and not marker[0]
        at = stop = _past_space(text, marker.end())
        values: list[Any] = []
        why = ""
        while True:
            try:
                value, stop = decode(text, at)
            except ValueError as error:
                why, stop = f"The call is not valid JSON: {error}", self._end(text, at)
                break
            values += value if isinstance(value, list) and not name else [value]
            at = _past(_JOINT, text, stop)
            if bare or len(values) >= MOST_CALLS or not text.startswith("{", at):
                break
        closing = self.closes.match(text, _past_space(text, stop))
        stop = closing.end() if closing and not why else stop
        if name and len(values) > 1:
            values, why = [], f"A call has one JSON object of arguments, got {len(values)} of them."
        for value in values:
            call = as_call(value, name, marker.start(), stop, identity)
            if not (bare and call.error) or call.name in schemas:
                yield call
        if why and (not bare or not text[: marker.start()].strip() or _named(text, at) in schemas):
            yield ToolCall(name or _named(text, at), {}, marker.start(), stop, why)

    def _end(self, text: str, start: int) -> int:
        """Where a call that cannot be read ends: behind its closing marker, before the next call, or at the end."""
        ends = [len(text)]
        if closing := self.closes.search(text, start):
            ends.append(max(closing.end(), start))
        if following := self.opens.search(text, start + 1):
            ends.append(following.start())
        return min(ends)


def as_call(value: Any, name: str, start: int, stop: int, identity: str = "") -> ToolCall:
    """A call out of decoded JSON: the arguments alone if `name` is known, else an object that holds both."""
    if isinstance(value, dict) and not name:
        inner = value.get("function")
        value = inner if isinstance(inner, dict) else value
        name = next((text for text in (value.get("name"), inner) if isinstance(text, str)), "")
        keys = [key for key in ("arguments", "parameters") if key in value]
        if not name or (not keys and len(value) > 1):
            return ToolCall(name, {}, start, stop, f"The call must have the form {WANTED}.")
        value = value[keys[0]] if keys else {}
    if isinstance(value, str):
        try:
            value = loads(value)
        except ValueError as error:
            return ToolCall(name, {}, start, stop, f"The arguments are not valid JSON: {error}")
    if not name:
        return ToolCall("", {}, start, stop, f"The call must have the form {WANTED}.")
    if not isinstance(value, dict):
        return ToolCall(name, {}, start, stop, f"The arguments must be a JSON object, got {json.dumps(value):.80}.")
    return ToolCall(name, value, start, stop, id=identity)


def _named(text: str, at: int) -> str:
    """The tool that JSON at `at` names at its beginning, whether or not the rest can be read."""
    found = _NAMED.match(text, at)
    return found["name"] if found else ""


def _past_space(text: str, at: int) -> int:
    return _past(_SPACE, text, at)


def _past(pattern: re.Pattern[str], text: str, at: int) -> int:
    passed = pattern.match(text, at)
    assert passed is not None
    return passed.end()


HERMES = JsonCalls(
    re.compile(r"<tool_call>|<tool_calls>(?!\s{0,99}<)"),
    re.compile(r"</tool_calls?>"),
    '<tool_call>\n{"name": {name}, "arguments": {arguments}}\n</tool_call>',
)
LLAMA = JsonCalls(
    re.compile(r"<\|python_tag\|>|<function=" + NAME + r'>|(?=\{\s*"(?:name|type|parameters|arguments|function)")'),
    re.compile(r";|</function>|<\|eom_id\|>"),
    '{"name": {name}, "parameters": {arguments}}',
    joint="; ",
    bare=True,
)
MISTRAL = JsonCalls(
    re.compile(
        r"\[TOOL_CALLS\]\s{0,9}(?:" + NAME + r"\s{0,9}(?:\[CALL_ID\](?P<id>\w{1,99})\s{0,9})?(?:\[ARGS\]|(?=\{)))?"
    ),
    re.compile(r"(?!)"),
    "[TOOL_CALLS]{tool}[ARGS]{arguments}",
    joint="",
)
HARMONY = JsonCalls(
    re.compile(
        r"(?:(?:\A|<\|start\|>assistant)(?:<\|channel\|>\w{1,20})?|<\|channel\|>\w{1,20}) {0,2}"
        r"to=(?!(?:user|assistant|all)\b)(?:functions\.)?"
        + NAME
        + r"[^<]{0,99}(?:<\|(?:channel|constrain)\|>[^<]{0,99}){0,3}<\|message\|>"
    ),
    re.compile(r"<\|call\|>"),
    "<|channel|>commentary to=functions.{tool} <|constrain|>json<|message|>{arguments}",
    joint="<|call|><|start|>assistant",
)
DEEPSEEK = JsonCalls(
    re.compile(
        r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
        + NAME
        + r"(?:<｜tool▁sep｜>|\s{0,9}```json\n?)"
    ),
    re.compile(r"(?:```\s*)?<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?"),
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{tool}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
)
KIMI = JsonCalls(
    re.compile(
        r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
        r"(?P<id>(?:functions\.)?" + NAME + r"(?::\d{1,9})?)\s*<\|tool_call_argument_begin\|>"
    ),
    re.compile(r"<\|tool_call_end\|>(?:<\|tool_calls_section_end\|>)?"),
    "<|tool_call_begin|>functions.{tool}:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
    joint="",
)
