"""Tools in ordinary words, for chat templates that have none for them (Gemma 3, DeepSeek-V3, base models)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from llm_gym.core import Message, Messages
from llm_gym.envs.tools.parsers.calls import ToolCall
from llm_gym.envs.tools.parsers.literal_calls import Fenced, code_tool

if TYPE_CHECKING:
    from llm_gym.envs.tools.parsers.formats import Format

LISTED = """\
You can call these tools:
<tools>
{tools}
</tools>
To call one, write its name and its arguments in this form:
{example}
The result comes with the next message. When you need no more calls, give your answer without one."""
FENCED = """\
You can call one tool, {name}: {about}
To call it, write its argument `{key}`{note} in a block of this form:
{example}
The result comes with the next message. When you need no more calls, give your answer without such a block."""


@dataclass(frozen=True, slots=True)
class InWords:
    """A `chat.Wording`: messages about tools as messages without."""

    format: Format
    """How calls are written and results stand."""
    system: bool
    """Whether the tools are described in the system message; else in the first user message."""
    turns: bool = True
    """Whether calls and results are put into ordinary text; else the template writes them, in this very format."""

    def __call__(self, messages: Messages, tools: Sequence[dict[str, Any]] | None) -> Messages:
        """Calls as the text of their reply, all results of a reply as one user message, and `tools` described.

        What a user says beside results stands in that message too: many templates want the roles to alternate.
        """
        if self.turns:
            messages = [new for _, some in groupby(messages, _asks) for new in self._said(list(some))]
        return self._told(messages, describe(self.format, tools)) if tools else messages

    def _said(self, messages: Messages) -> Messages:
        if any(m["role"] == "tool" for m in messages):
            return [{"role": "user", "content": "\n".join(map(self._shown, messages))}]
        return [self._reply(m) if m.get("tool_calls") else m for m in messages]

    def _shown(self, message: Message) -> str:
        text = str(message.get("content") or "")
        return self.format.result.replace("{}", text) if message["role"] == "tool" else text

    def _reply(self, message: Message) -> Message:
        calls = [call.get("function", call) for call in message["tool_calls"]]
        written = self.format.notation.write([ToolCall(call["name"], _arguments(call)) for call in calls])
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**rest, "content": "\n".join(filter(None, [message.get("content"), written]))}

    def _told(self, messages: Messages, text: str) -> Messages:
        if self.system:  # one message: some templates show only the first of several, or only the last
            own = list(takewhile(lambda m: m["role"] == "system", messages))
            said = "\n\n".join([*(m["content"] for m in own), text])
            return [{"role": "system", "content": said}, *messages[len(own) :]]
        at = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if at is None:
            return [{"role": "user", "content": text}, *messages]
        asked = {**messages[at], "content": f"{text}\n\n{messages[at]['content']}"}
        return [*messages[:at], asked, *messages[at + 1 :]]


def describe(form: Format, tools: Sequence[dict[str, Any]]) -> str:
    """What the model is told: the tools, and how to call them in this format."""
    if isinstance(form.notation, Fenced):
        function = tools[0]["function"]
        schema = function.get("parameters") or {}
        name, key = code_tool({function["name"]: schema})
        note = schema["properties"][key].get("description")
        return FENCED.format(
            name=name,
            about=function.get("description") or "it takes one text.",
            key=key,
            note=f" ({note})" if note else "",
            example=form.notation.write([ToolCall(name, {key: "print(6 * 7)" if key == "code" else "..."})]),
        )
    example = form.notation.write([ToolCall("name_of_the_tool", {"name_of_the_argument": "value"})])
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return LISTED.format(tools=listed, example=example)


def _asks(message: Message) -> bool:
    return message["role"] in ("tool", "user")


def _arguments(call: Any) -> dict[str, Any]:
    """A structured call's arguments, which may be JSON text."""
    found: dict[str, Any] = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
    return found
