"""The ways in which models write tool calls, by name, and which of them a chat template uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from llm_gym.chat import Chat
from llm_gym.envs.tools import json_calls, literal_calls, tag_calls
from llm_gym.envs.tools.calls import Schemas, ToolCall, open_thinking, without_thinking
from llm_gym.errors import ConfigError, TemplateError, unknown


class Notation(Protocol):
    """Text to calls and back. Whatever the text, `read` raises nothing: a call that cannot be read says why."""

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write tool calls."""

    name: str
    notation: Notation
    about: str
    """What it looks like, and who writes it."""
    native: bool = True
    """Whether the chat template shows the tools and has turns for results; else results are user messages."""


FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Format("hermes", json_calls.HERMES, "JSON in <tool_call>: Hermes, Qwen2.5, Qwen3, Granite"),
        Format("qwen_xml", tag_calls.QWEN_XML, "<function=f><parameter=a>: Qwen3-Coder, Qwen3.5 and on, Nemotron 3"),
        Format("glm", tag_calls.GLM, "<arg_key>, <arg_value> in <tool_call>: GLM 4.5 and on"),
        Format("llama", json_calls.LLAMA, 'bare {"name", "parameters"}: Llama 3.1 and on'),
        Format("mistral", json_calls.MISTRAL, "[TOOL_CALLS] and a JSON list, or name[ARGS]{...}: Mistral"),
        Format("pythonic", literal_calls.Pythonic(), '[f(a="x")]: Llama 4, Llama 3.2, LFM2'),
        Format("gemma", literal_calls.Gemma(), "<|tool_call>call:f{...}: Gemma 4"),
        Format("harmony", json_calls.HARMONY, "to=functions.f in the commentary channel: gpt-oss"),
        Format("deepseek", json_calls.DEEPSEEK, "<｜tool▁call▁begin｜>: DeepSeek V3, V3.1"),
        Format("kimi", json_calls.KIMI, "<|tool_call_begin|>functions.f:0: Kimi K2"),
        Format("invoke", tag_calls.INVOKE, '<invoke name="f"><parameter name="a">: MiniMax, DeepSeek V3.2, Muse'),
        Format("python_block", literal_calls.Fenced(), "a fenced block of Python: any chat model", native=False),
    )
}
"""Every format by name; a template's own is the first that reads what the template writes."""

QUESTION = {"role": "user", "content": "q"}
PROBE: dict[str, Any] = {"text": 'a "b"\n<c>', "count": 3}
"""Arguments that tell the formats apart."""


def named(name: str) -> Format:
    """The format called `name`.

    Raises:
        ConfigError: no such format; the nearest is named.
    """
    if name not in FORMATS:
        raise ConfigError(unknown("tool_format", name, FORMATS))
    return FORMATS[name]


@lru_cache(maxsize=256)
def detect(chat: Chat) -> Format:
    """The format that a chat's template writes: the first that reads a call of the template back exactly.

    Raises:
        TemplateError: the template does not show the tools, or writes calls in no known format.
    """
    advice = "; name the format by tool_format= and describe the tools in the system prompt."
    if chat.tools and not all(t["function"]["name"] in chat.text(chat.open([QUESTION])) for t in chat.tools):
        raise TemplateError(f"chat template: it does not show tools to the model{advice}")
    why = "it writes no tool calls, or in no known format"
    for form in ("dict", "json"):
        try:
            prompt, reply = chat.calling([("probe", PROBE)], [PROBE_TOOL], form)
        except TemplateError as error:
            why = f"it writes no tool calls ({error})"
            continue
        for candidate in FORMATS.values():
            found = read(candidate, reply, open_thinking(prompt), SCHEMAS) if candidate.native else []
            if [(call.name, call.arguments, call.error) for call in found] == [("probe", PROBE, "")]:
                return candidate
    raise TemplateError(f"chat template: {why}{advice}")


def read(used: Format, text: str, closing: str, schemas: Schemas) -> list[ToolCall]:
    """The calls in a reply, none of them from its thinking; `closing` is the tag that ends the thinking it is in."""
    return used.notation.read(without_thinking(text, closing), schemas)


PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Shows how a template writes a call.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "A text."},
                "count": {"type": "integer", "description": "A number."},
            },
            "required": ["text", "count"],
        },
    },
}
SCHEMAS: Schemas = {"probe": PROBE_TOOL["function"]["parameters"]}
