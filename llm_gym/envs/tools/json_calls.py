"""Tool calls written as JSON behind a marker: Hermes and Qwen, Llama 3, Mistral, gpt-oss, DeepSeek, Kimi."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_gym.envs.tools.calls import MOST_CALLS, Schemas, ToolCall
from llm_gym.envs.tools.literals import decode, loads

WANTED = '{"name": ..., "arguments": {...}}'
NAME = r"(?P<name>[\w.-]{1,200})"
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class JsonCalls:
    """Reads and writes calls of one JSON format.

    Args:
        opens: what stands before the JSON; a group `name` where the name is not in the JSON, `id` likewise.
        closes: what may stand behind it.
        pattern: how a call is written, with `{name}` (JSON text), `{tool}` (the bare name) and `{arguments}`.
        joint: what is written between two calls.
        bare: there is no marker, so JSON of another form is ordinary text.
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
            calls = list(self._at(text, marker))
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

    def _at(self, text: str, marker: re.Match[str]) -> Iterator[ToolCall]:
        """The calls behind one marker: several where the JSON is a list."""
        groups = marker.groupdict()
        name = groups.get("name") or ""
        start = _past_space(text, marker.end())
        try:
            value, stop = decode(text, start)
        except ValueError as error:
            if not self.bare or not text[: marker.start()].strip():
                yield ToolCall(name, {}, marker.start(), self._end(text, start), f"The call is not valid JSON: {error}")
            return
        closing = self.closes.match(text, _past_space(text, stop))
        stop = closing.end() if closing else stop
        for one in value if isinstance(value, list) and not name else [value]:
            call = as_call(one, name, marker.start(), stop, groups.get("id") or "")
            if not (self.bare and call.error):
                yield call

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
        name = value["name"] if isinstance(value.get("name"), str) else ""
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


def _past_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


HERMES = JsonCalls(
    re.compile(r"<tool_call>"),
    re.compile(r"</tool_call>"),
    '<tool_call>\n{"name": {name}, "arguments": {arguments}}\n</tool_call>',
)
LLAMA = JsonCalls(
    re.compile(r'(?:<\|python_tag\|>\s*)?(?=\{\s*"(?:name|type|parameters|arguments|function)")'),
    re.compile(r";|<\|eom_id\|>"),
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
        r"(?:(?:\A|<\|start\|>assistant)(?:<\|channel\|>commentary)?|<\|channel\|>commentary) {0,2}to=functions\."
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
