"""An assistant message of a data set as the ids that a policy would have sampled.

One rule, whatever the message's form: trained is the reply as the chat template writes it behind its own generation
prompt, up to the stop token. So thinking that the prompt opens is gone on from, and the template's frame (channels, an
end of the response, trimmed spaces) is there. All that was said must stand in it, once: a template that drops the
thinking, or opens it again, gets the message in another form; if none will do, the text stands as it was said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_gym.chat import QUESTION, SENTINEL, Chat
from llm_gym.core import Ids, Message
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import THINKING, open_thinking
from llm_gym.errors import DataError, TemplateError

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates look for thinking."""
USUAL = "<think>"
"""The tag that opens thinking where the prompt does not say."""
TAIL = 8
"""Tokens at a context's end that show whether it ends inside thinking."""


class _Said(NamedTuple):
    """What a message says."""

    thoughts: str
    answer: str
    closed: bool = True
    """Whether the thinking is over: a reply may have been cut inside it."""
    text: str = ""
    """Both as they stand behind a prompt that opens no thinking, where the message is text alone."""


def reply_ids(
    chat: Chat, message: Message, context: Ids | None = None, opening: Sequence[Message] = (QUESTION,)
) -> Ids:
    """An assistant message as the ids that a policy would have sampled, the stop token included, int32 [n].

    Structured calls are written by the chat template, and read back by the code that runs them.

    Args:
        chat: the tokenizer's.
        message: what the assistant said.
        context: the ids that it stands behind, int32 [m]; None: those of `opening`.
        opening: the messages up to the first reply.

    Raises:
        DataError: the message is no text, or its calls do not survive.
    """
    message = {name: value for name, value in message.items() if name not in ("train", "weight")}
    if not isinstance(message.get("content") or "", str):
        raise DataError(f"messages: an assistant's content is {message['content']!r:.60}, want text.")
    first = chat.open(list(opening))
    context = first if context is None else context
    prompt, usual = (chat.text(ids[-TAIL:]) for ids in (context, first))
    if message.get("tool_calls"):
        return _calling(chat, message, prompt, context, opening)
    said = _parts(message, prompt)
    # A template may add no generation prompt behind the results of tools: then its writing does not fit.
    fits = said.closed and open_thinking(prompt) == open_thinking(usual)
    writings = _writings(chat, message, said, prompt, opening) if fits else iter(())
    text = next(writings, "") or _spelled(said, prompt) + chat.ending
    return chat.encode_behind(text, context)


def as_tree(value: Any) -> Any:
    """A cell that is JSON text, as tables hold trees, as the tree."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


# The forms of a message


def _parts(message: Message, prompt: str) -> _Said:
    """The thinking and the answer of a message that stands behind `prompt`."""
    content = message.get("content") or ""
    given = next((message[name] for name in THOUGHTS if message.get(name)), "")
    opening, closing, opened = _tags(prompt)
    if given:
        before, closed, answer = content.partition(closing)
        twice = closed and _squeezed(before.replace(opening, "", 1)) == _squeezed(given)
        return _Said(given, answer.lstrip("\n") if twice else content)
    begins = content.lstrip().startswith(opening)
    thoughts, closed, answer = content.partition(closing)
    if not (begins or (opened and closed)):
        return _Said("", content, text=content)
    if not closed:
        return _Said(thoughts.lstrip().removeprefix(opening).lstrip("\n"), "", closed=False, text=content)
    return _Said(thoughts.replace(opening, "", 1).strip("\n"), answer.lstrip("\n"), text=content)


def _tags(prompt: str) -> tuple[str, str, bool]:
    """The tags of thinking, and whether `prompt` ends inside it."""
    closing = open_thinking(prompt)
    pairs = {other: one for one, other in THINKING.items()}
    return pairs.get(closing, USUAL), closing or THINKING[USUAL], bool(closing)


def _spelled(said: _Said, prompt: str) -> str:
    """The reply in plain text behind `prompt`: what is said, between the tags that are still missing."""
    opening, closing, opened = _tags(prompt)
    if not opened and (said.text or not said.thoughts):
        return said.text or said.answer
    start = "" if opened else opening
    newline = "" if opened and prompt.endswith("\n") else "\n"
    end = f"\n{closing}\n\n{said.answer}" if said.closed else ""
    return start + newline + said.thoughts + end


def _writings(chat: Chat, message: Message, said: _Said, prompt: str, opening: Sequence[Message]) -> Iterator[str]:
    """What the template writes for the message, in each form in which it says all of it once."""
    rest = {name: value for name, value in message.items() if name not in THOUGHTS}
    forms: list[Message] = []
    if said.thoughts or open_thinking(prompt):  # thinking that the template leaves out if empty is only held there
        forms = [{**rest, name: said.thoughts or SENTINEL, "content": said.answer} for name in THOUGHTS]
    forms += [rest, {**rest, "content": _spelled(said, prompt)}]
    for form in forms:
        try:
            text = chat.write(form, opening).replace(SENTINEL, "", 1)
        except TemplateError:
            continue
        if _says_once(text, said, prompt):
            yield text


def _says_once(text: str, said: _Said, prompt: str) -> bool:
    """Whether all of `said` stands in `text`, spaces aside, and what the prompt opened is closed once."""
    letters, at = _squeezed(text), 0
    for part in map(_squeezed, (said.thoughts, said.answer)):
        at = letters.find(part, at) + len(part)
        if at < len(part):
            return False
    opening, closing, opened = _tags(prompt)
    times = {opening: 0, closing: 1} if opened else {}
    return all(text.count(tag) == said.answer.count(tag) + number for tag, number in times.items())


def _squeezed(text: str) -> str:
    return "".join(text.split())


# Tool calls


def _calling(chat: Chat, message: Message, prompt: str, context: Ids, opening: Sequence[Message]) -> Ids:
    """A reply with tool calls, as the template writes it and the environments read it.

    Raises:
        DataError: there is no such reply.
    """
    wanted = [_call(call) for call in message["tool_calls"]]
    if not chat.tools:
        raise DataError(f"messages: the assistant calls {wanted[0][0]!r}, but the example has no tools.")
    used, closing = formats.detect(chat), open_thinking(prompt)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in chat.tools}
    why = "it does not go on from its own generation prompt"
    for text in _with_calls(chat, message, wanted, prompt, opening):
        ids = chat.encode_behind(text, context)
        found = formats.read(used, chat.text(ids), closing, schemas)
        if [(call.name, call.arguments, call.error) for call in found] == [(*call, "") for call in wanted]:
            return ids
        why = f"they read back as {[(call.name, call.arguments) for call in found]!r:.120}"
    raise DataError(f"messages: the chat template cannot write the calls {wanted!r:.120}: {why}.")


def _with_calls(
    chat: Chat, message: Message, wanted: Sequence[tuple[str, Any]], prompt: str, opening: Sequence[Message]
) -> Iterator[str]:
    """Ways to write a message with calls, the best first: all of it by the template; the calls by the template and
    what else was said in front of them; the calls alone, where what is said beside them would hide them."""
    said, nothing = _parts(message, prompt), _Said("", "")
    opening_tag, closing, opened = _tags(prompt)
    forms = [{**message, "tool_calls": _calls(message["tool_calls"], wanted, form)} for form in (dict, json.dumps)]
    for form in forms:
        yield from _writings(chat, form, said, prompt, opening)
    for form in forms:
        bare = {"role": "assistant", "content": "", "tool_calls": form["tool_calls"]}
        for text in _writings(chat, bare, nothing, prompt, opening):
            calls = text.partition(closing)[2] if opened else text
            if opening_tag not in calls:
                yield _spelled(said, prompt) + calls
            yield text
    if chat.wording is not None:
        (told,), _ = chat.as_shown(forms[:1], None)
        yield _spelled(_parts(told, prompt), prompt) + chat.ending


def _calls(calls: Sequence[Any], wanted: Sequence[tuple[str, Any]], form: Callable[[Any], Any]) -> list[Message]:
    """The calls in the usual structure, with their arguments in the form that a template wants."""
    return [
        {"id": f"call{i:05d}", "type": "function", **call, "function": {"name": name, "arguments": form(arguments)}}
        for i, (call, (name, arguments)) in enumerate(zip(calls, wanted, strict=True))
    ]


def _call(call: Any) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a structured call."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, given = function.get("name"), as_tree(function.get("arguments", {}))
    if not isinstance(name, str) or not isinstance(given, Mapping):
        raise DataError(f"messages: got the tool call {call!r:.80}, want a name and arguments.")
    return name, dict(given)
