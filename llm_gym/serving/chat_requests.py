"""What a chat request asks for: OpenAI's `/v1/chat/completions`, checked, in the form that chat templates take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_gym.core import Message, Messages
from llm_gym.errors import unknown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of the protocol, and what chat templates call them."""
REFUSED = {
    "n": (1, "ask several times instead"),
    "logit_bias": ({}, "it would change the distribution that is trained"),
    "logprobs": (False, "log-probabilities are kept with the episode"),
    "functions": ([], "pass tools"),
    "function_call": (None, "pass tool_choice"),
    "modalities": (["text"], "the model writes text"),
    "audio": (None, "the model writes text"),
}
"""Parameters that are refused unless they hold the value that changes nothing, and what is said of them. Those that are
not read below are ignored: how a run samples is its own setting, whatever `temperature` or `seed` a client sends."""
UNFORCED = ("text", "json_object")
"""Forms of a reply that a request may name. Whoever asks for JSON must say so in the messages; nothing else is done."""
MOST_STOPS = 4
"""Stop sequences of a request, as OpenAI has it."""


class Refused(Exception):
    """A request that is answered with an HTTP status and OpenAI's form of an error."""

    def __init__(self, text: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As the protocol has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat, and how it is to go on."""

    messages: Messages
    """In the form that chat templates take: text as strings, arguments of calls as objects, results with a name."""
    tools: Sequence[Mapping[str, Any]]
    """Schemas; empty: none."""
    forced: str | None
    """The tool that must be called; empty: any of them; None: none must."""
    calls: bool
    """Whether calls are read from the reply."""
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a stream ends with the counts of tokens."""
    model: str

    @property
    def links(self) -> list[bytes]:
        """A digest of the tools and the first n messages, for n from 0 to all: equal where the chats are the same."""
        found = [_digest(b"", json.dumps(self.tools, sort_keys=True))]
        places: dict[str, int] = {}  # of calls by their ids, which some clients make anew
        for message in self.messages:
            if message.get("tool_calls"):
                places = {str(call["id"]): i for i, call in enumerate(message["tool_calls"])}
            found.append(link(found[-1], message, places.get(str(message.get("tool_call_id")))))
        return found


def link(before: bytes, message: Message, place: int | None = None) -> bytes:
    """The digest of a chat that goes on with `message`; `place` is that of the call of which it is the result.

    An assistant's message counts as the same without its thinking, with other white space, and with its arguments
    serialised otherwise: that is how clients send replies back.
    """
    content = message.get("content") or ""
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls") or ()]
    if message["role"] == "assistant":
        content = " ".join(content.split())
    return _digest(before, json.dumps([message["role"], content, calls, place], sort_keys=True))


def _digest(before: bytes, text: str) -> bytes:
    return hashlib.blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_request(body: Any) -> ChatRequest:
    """What the JSON of a request asks for.

    Raises:
        Refused: it asks for what cannot be had, or is no such request; names the parameter.
    """
    if not isinstance(body, Mapping):
        raise Refused("The body is no JSON object.")
    for name, (plain, instead) in REFUSED.items():
        if body.get(name) not in (None, plain):
            raise Refused(f"{name}: got {body[name]!r:.80}, which is not supported; {instead}.", param=name)
    form = body.get("response_format") or {}
    if not isinstance(form, Mapping) or form.get("type", "text") not in UNFORCED:
        raise Refused(
            "response_format: no schema is enforced; ask for the form in the messages (json_object), or by a tool.",
            param="response_format",
        )
    tools = _tools(body.get("tools"))
    forced, calls = _choice(body.get("tool_choice"), [tool["function"]["name"] for tool in tools])
    options = body.get("stream_options") or {}
    return ChatRequest(
        _messages(body.get("messages")),
        tools,
        forced,
        calls and bool(tools),
        _limit(body),
        _stops(body.get("stop")),
        body.get("stream") is True,
        isinstance(options, Mapping) and bool(options.get("include_usage")),
        str(body.get("model") or ""),
    )


def _limit(body: Mapping[str, Any]) -> int | None:
    given = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    for value in given:
        if not isinstance(value, int) or value < 1:
            raise Refused(f"max_completion_tokens: got {value!r:.80}, want at least 1.", param="max_completion_tokens")
    return min(given, default=None)


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if not (isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)):
        raise Refused(f"stop: got {given!r:.80}, want a text or a list of {MOST_STOPS} at most.", param="stop")
    return tuple(stops)


def _tools(given: Any) -> Sequence[Mapping[str, Any]]:
    tools = given or []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise Refused(f"tools: got {tool!r:.80}, want functions with a name each.", param="tools")
    # What templates and readers look at; `strict` and the like would make the same tools another chat.
    kept = ("name", "description", "parameters")
    return [{"type": "function", "function": {k: t["function"][k] for k in kept if k in t["function"]}} for t in tools]


def _choice(given: Any, names: Sequence[str]) -> tuple[str | None, bool]:
    """(the tool that must be called, whether calls are read)."""
    if given in (None, "auto", "none"):
        return None, given != "none"
    if given == "required":
        name = ""
    elif isinstance(given, Mapping) and isinstance(given.get("function"), Mapping):
        name = str(given["function"].get("name"))
        if name not in names:
            raise Refused(unknown("tool_choice", name, names), param="tool_choice")
    else:
        raise Refused(f"tool_choice: got {given!r:.80}, want auto, none, required or a function.", param="tool_choice")
    if not names:
        raise Refused("tool_choice: a call is asked for, but the request has no tools.", param="tool_choice")
    return name, True


def _messages(given: Any) -> Messages:
    if not isinstance(given, list) or not given:
        raise Refused("messages: want a list of at least one message.", param="messages")
    names: dict[str, str] = {}
    plain = []
    for i, message in enumerate(given):
        if not isinstance(message, Mapping) or str(message.get("role")) not in ROLES:
            raise Refused(f"messages[{i}]: got {message!r:.80}, want a role of {', '.join(ROLES)}.", param="messages")
        made = _message(i, message)
        for call in made.get("tool_calls", ()):
            names[str(call.get("id"))] = call["function"]["name"]
        if made["role"] == "tool" and "name" not in made and (name := names.get(str(made.get("tool_call_id")))):
            made["name"] = name  # some templates write it, and the protocol leaves it out
        plain.append(made)
    return plain


def _message(number: int, message: Mapping[str, Any]) -> Message:
    made: Message = {"role": ROLES[message["role"]], "content": _text(number, message.get("content"))}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(message.get(name), str):
            made[name] = message[name]
    calls = message.get("tool_calls") or ()
    try:
        made |= {"tool_calls": [_call(call) for call in calls]} if calls else {}
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"messages[{number}].tool_calls: cannot be read: {error!r:.80}.", param="messages") from error
    return made


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = arguments
    return {"id": call.get("id"), "type": "function", "function": {"name": str(function["name"]), "arguments": value}}


def _text(number: int, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    if len(texts) == len(parts):
        return "".join(texts)
    raise Refused(f"messages[{number}].content: got {content!r:.80}, want text.", param="messages")
