"""Tool calls with a tag around each argument: Qwen3-Coder and Nemotron, GLM, and the `invoke` family."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_gym.envs.tools.parsers.calls import MOST_CALLS, Schemas, ToolCall
from llm_gym.envs.tools.parsers.literals import loads

_SPACE = re.compile(r"\s*")
_WORDS = {"True": True, "False": False, "None": None}
"""What Jinja writes for JSON's true, false and null."""


@dataclass(frozen=True)
class TagCalls:
    """Reads and writes calls of one tag format; patterns may use `{ns}`, the namespace that the call's tag has.

    Args:
        opens: what starts a call, with the group `name`, and `ns` where there are namespaces.
        closes: what ends it.
        argument: what starts an argument, with the group `key`; a group `text` says that the value is a string.
        ends: the text that ends an argument.
        pattern: how a call is written, with `{tool}` and `{arguments}`.
        pair: how an argument is written, with `{key}` and `{value}`.
        padded: values stand on lines of their own, so one line break at each end is not theirs.
    """

    opens: re.Pattern[str]
    closes: str
    argument: str
    ends: str
    pattern: str
    pair: str
    padded: bool = False

    def read(self, text: str, schemas: Schemas) -> list[ToolCall]:
        """The calls in `text`, readable or not."""
        found: list[ToolCall] = []
        at = 0
        while len(found) < MOST_CALLS and (opened := self.opens.search(text, at)):
            call = self._at(text, opened, schemas)
            at = max(call.stop, opened.end())
            found.append(call)
        return found

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them: strings as they are, other values as JSON."""
        written = []
        for call in calls:
            pairs = (
                self.pair.replace("{key}", key).replace("{value}", as_text(value))
                for key, value in call.arguments.items()
            )
            written.append(self.pattern.replace("{tool}", call.name).replace("{arguments}", "".join(pairs)))
        return "\n".join(written)

    def _at(self, text: str, opened: re.Match[str], schemas: Schemas) -> ToolCall:
        """The call that starts with `opened`."""
        name, space = opened["name"].strip(), opened.groupdict().get("ns") or ""
        argument, closes, ends = _compiled(self.argument, self.closes, self.ends, space)
        properties = schemas.get(name, {}).get("properties") or {}
        arguments: dict[str, Any] = {}
        at = opened.end()
        while True:
            at = _past_space(text, at)
            if closed := closes.match(text, at):
                return ToolCall(name, arguments, opened.start(), closed.end())
            if not (tag := argument.match(text, at)):
                got = f"got {text[at : at + 20]!r}" if at < len(text) else "but the text ends"
                error = f"want an argument or the end of the call, {got}."
                break
            key, end = tag["key"].strip(), ends.search(text, tag.end())
            if end is None or self._goes_on(text[tag.end() : end.start()], argument, closes, properties):
                error = f"the argument {key!r} is not closed."
                at = tag.end()
                break
            if key in arguments:
                error = f"the argument {key!r} is given twice."
                break
            value = self._value(text[tag.end() : end.start()])
            arguments[key] = value if tag.groupdict().get("text") == "true" else typed(value, properties.get(key))
            at = end.end()
        end = closes.search(text, at)
        stop = end.end() if end else len(text)
        following = self.opens.search(text, max(at, opened.end()))
        stop = min(stop, following.start()) if following else stop
        return ToolCall(name, {}, opened.start(), stop, f"The call cannot be read: {error}")

    def _goes_on(
        self, value: str, argument: re.Pattern[str], closes: re.Pattern[str], properties: Mapping[str, Any]
    ) -> bool:
        """Whether a value holds what stands behind it: another argument of the tool, or the call's end and a call.

        Its own closing tag is then missing, and the one that was found is a later argument's.
        """
        if any(tag["key"].strip() in properties for tag in argument.finditer(value)):
            return True
        closed = closes.search(value)
        return closed is not None and self.opens.search(value, closed.end()) is not None

    def _value(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n") if self.padded else text


def typed(text: str, schema: Mapping[str, Any] | None) -> Any:
    """The value that an argument's text stands for, as its schema wants it.

    A string stays as it is wherever the schema allows one; otherwise the text is JSON (or Python's `True`). Text
    that is neither stays a string, for the check of the arguments to complain about. Without a schema, JSON counts.
    """
    if allows_string(schema):
        return text
    stripped = text.strip()
    if stripped in _WORDS:
        return _WORDS[stripped]
    try:
        return loads(stripped)
    except ValueError:
        return text


def allows_string(schema: Any) -> bool:
    """Whether a schema says that a value may be a string; `true` (anything) does not say it."""
    if not isinstance(schema, Mapping):
        return False
    options = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if any(allows_string(option) for option in options if isinstance(option, Mapping)):
        return True
    types = schema.get("type", ())
    if "string" in ([types] if isinstance(types, str) else types):
        return True
    return any(isinstance(value, str) for value in [*schema.get("enum", ()), schema.get("const")])


def as_text(value: Any) -> str:
    """An argument's value between its tags."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _compiled(
    argument: str, closes: str, ends: str, space: str
) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Patterns for one namespace. A value ends where its tag closes AND another argument or the call's end follows:
    values may hold the tag themselves."""
    argument, closes, ends = (part.replace("{ns}", re.escape(space)) for part in (argument, closes, ends))
    return re.compile(argument), re.compile(closes), re.compile(rf"{ends}(?=\s*(?:{argument}|{closes}))")


def _past_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


QWEN_XML = TagCalls(
    opens=re.compile(r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]{1,200})>"),
    closes=r"</function>(?:\s*</tool_call>)?",
    argument=r"<parameter=(?P<key>[^>\n]{1,200})>",
    ends=r"</parameter>",
    pattern="<tool_call>\n<function={tool}>\n{arguments}</function>\n</tool_call>",
    pair="<parameter={key}>\n{value}\n</parameter>\n",
    padded=True,
)
GLM = TagCalls(
    opens=re.compile(r"<tool_call>\s*(?P<name>[\w.-]{0,200})"),
    closes=r"</tool_call>",
    argument=r"<arg_key>(?P<key>[^<\n]{1,200})</arg_key>\s{0,9}<arg_value>",
    ends=r"</arg_value>",
    pattern="<tool_call>{tool}\n{arguments}</tool_call>",
    pair="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
)
INVOKE = TagCalls(
    opens=re.compile(r'<(?P<ns>[\w:｜|]{0,40})invoke name="(?P<name>[^"\n]{1,200})">'),
    closes=r"</{ns}invoke>",
    argument=r'<{ns}parameter name="(?P<key>[^"\n]{1,200})"(?: string="(?P<text>true|false)")?>',
    ends=r"</{ns}parameter>",
    pattern='<invoke name="{tool}">\n{arguments}</invoke>',
    pair='<parameter name="{key}">{value}</parameter>\n',
)
