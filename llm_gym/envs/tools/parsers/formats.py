"""The ways in which models write tool calls, by name, and which of them a chat uses."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from llm_gym.chat import Chat, load_chat
from llm_gym.envs.tools.parsers import json_calls, literal_calls, tag_calls
from llm_gym.envs.tools.parsers.calls import Schemas, ToolCall, open_thinking, without_thinking
from llm_gym.envs.tools.parsers.literal_calls import code_tool
from llm_gym.envs.tools.parsers.words import InWords
from llm_gym.envs.tools.schema import example_arguments
from llm_gym.errors import ConfigError, TemplateError, unknown

log = logging.getLogger(__name__)


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
    """Whether there are chat templates that write it; else tools are always shown in words (see `words`)."""
    result: str = "<tool_response>\n{}\n</tool_response>"
    """How a result stands in a user message, where the chat template has no turn for it."""


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
        Format(
            "python_block",
            literal_calls.Fenced(),
            "a fenced block of Python: any chat model",
            native=False,
            result="```output\n{}\n```",
        ),
    )
}
"""Every format by name; a template's own is the first that reads what the template writes."""

QUESTION = {"role": "user", "content": "q"}
MARK = "SYSTEMqzTEXT"
"""Stands for a system message in a dummy render."""
_TAGS = re.compile(
    r"<tool_calls?>|<function=|invoke name=\"|\[TOOL_CALLS\]|<\|python_(?:tag|start)\|>"
    r"|<\|tool_call(?:_start|_begin)?\|?>|<start_function_call>|<｜tool▁call▁begin｜>|commentary to=functions"
)
"""What no text but a call holds."""
_BARE = ("llama", "pythonic")
"""Formats whose calls may have no tag."""
_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>.*?(?=<\|(?:end|start|channel)\|>|\Z)", re.S)
"""Harmony's thinking; a call from there names its recipient in front of the message."""
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
    """The format of a chat's calls: its wording's, else what its template writes, as `written` finds it.

    Raises:
        TemplateError: the template does not show the tools, or writes calls in no known format.
    """
    if isinstance(chat.wording, InWords):
        return chat.wording.format
    if not shows(chat):
        raise TemplateError("chat template: it does not show tools to the model.")
    found, why = written(chat)
    if found is None:
        raise TemplateError(f"chat template: {why}.")
    return found


def shows(chat: Chat) -> bool:
    """Whether the model is told the names of the chat's tools."""
    text = chat.text(chat.open([QUESTION]))
    return all(tool["function"]["name"] in text for tool in chat.tools or ())


def written(chat: Chat) -> tuple[Format | None, str]:
    """The first format that reads back a call as the chat template writes it; else None, and why."""
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
                return candidate, ""
    return None, why


def tool_chat(tokenizer: Any, tools: Sequence[dict[str, Any]], name: str | None = None) -> tuple[Chat, Format]:
    """The chat that shows these tools to the model, and the format in which its calls are read.

    The chat template does both where it can, in the format asked for. Where it shows no tools, writes no calls that can
    be read, or others than those asked for, the tools are said in words (`words.InWords`), which any template renders.

    Args:
        tokenizer: a tokenizer object.
        tools: the schemas.
        name: of a format; None: what the template writes, else `hermes`, or `python_block` for a tool that runs code.

    Raises:
        ConfigError: no such format, or one in which a tool cannot be called.
        TemplateError: the chat template cannot be extended exactly at all.
    """
    return _tool_chat(tokenizer, json.dumps(list(tools)), name)


@lru_cache(maxsize=256)
def _tool_chat(tokenizer: Any, tools_json: str, name: str | None) -> tuple[Chat, Format]:
    tools = json.loads(tools_json)
    chosen = None if name is None else named(name)
    shown, found = False, None
    try:
        native = load_chat(tokenizer, tools)
        shown, (found, _) = shows(native), written(native)
    except TemplateError:  # it has no turns for results; if that is not all, the chats below say so
        pass
    wanted = chosen or (found if shown and found else fallback(tools))
    if shown and (found is wanted or (found is None and chosen is not None and chosen.native)):
        return native, wanted
    _check_expresses(wanted, tools)
    words = InWords(wanted, _has_system(load_chat(tokenizer)), turns=found is not wanted)
    if chosen is None:
        _say(
            f"tools: the chat template has none; the {'system' if words.system else 'first user'} message describes "
            f"them, and calls are read as {wanted.name!r} (docs/tools.md)."
        )
    return load_chat(tokenizer, tools, words), wanted


def fallback(tools: Sequence[dict[str, Any]]) -> Format:
    """The format for a template without tools: a block of Python if the one tool runs code, else Hermes.

    It depends on the schemas alone, so that fine-tuning finds the format of the environment.
    """
    (first, *others) = (tool["function"] for tool in tools)
    code = not others and code_tool({first["name"]: first.get("parameters") or {}})[1] == "code"
    return FORMATS["python_block" if code else "hermes"]


def _check_expresses(form: Format, tools: Sequence[dict[str, Any]]) -> None:
    """Raises a ConfigError that names the first tool of which a call does not read back as it was written."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    for name, schema in schemas.items():
        arguments = example_arguments(schema)
        back = read(
            form, form.notation.write([ToolCall(name, arguments)]) if arguments or form.native else "", "", schemas
        )
        if [(call.name, call.arguments, call.error) for call in back] != [(name, arguments, "")]:
            raise ConfigError(
                f"tool_format: got {form.name!r}, which cannot call the tool {name!r} "
                f"(of {', '.join(schemas)}) as its schema wants; pass hermes."
            )


def _has_system(chat: Chat) -> bool:
    """Whether the template shows a system message."""
    try:
        return MARK in chat.text(chat.open([{"role": "system", "content": MARK}, QUESTION]))
    except TemplateError:
        return False


@lru_cache(maxsize=64)
def _say(text: str) -> None:
    """Tells a person once in a process."""
    log.warning(text)


def read(used: Format, text: str, closing: str, schemas: Schemas) -> list[ToolCall]:
    """The calls in a reply, none of them from its thinking; `closing` is the tag that ends the thinking it is in.

    A reply that holds none but was meant to has one that cannot be read: it is no final answer.
    """
    text = without_thinking(text, closing)
    return used.notation.read(text, schemas) or misplaced(used, text, schemas)


def misplaced(used: Format, text: str, schemas: Schemas) -> list[ToolCall]:
    """A call that says how to write it, if a reply without calls in the format `used` has those of another.

    What shows it is a tag of any format, or a tool's own name where the formats without tags have it.
    """
    text = _ANALYSIS.sub(lambda thought: " " * len(thought[0]), text)
    bare = [call for one in _BARE for call in FORMATS[one].notation.read(text, schemas) if call.name in schemas]
    starts = [found.start() for found in [_TAGS.search(text)] if found] + [call.start for call in bare]
    if not starts:
        return []
    form = used.notation.write([ToolCall("name_of_the_tool", {"name_of_the_argument": "value"})])
    why = f"The call cannot be read; calls are written in this form:\n{form}"
    return [ToolCall(bare[0].name if bare else "", {}, min(starts), len(text), why)]


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
