"""What a completion says, in OpenAI's form: thinking and tool calls apart; whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_gym.chat import Chat
from llm_gym.core import Completion, Message
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import THINKING, open_thinking, thinking, without_calls, without_thinking
from llm_gym.envs.tools.parsers.formats import Format
from llm_gym.serving.chat_requests import ChatRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, and what it was sampled after."""

    message: Message
    """As chat templates take it: arguments are objects."""
    finish: str
    """`stop`, `length` or `tool_calls`."""
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": sum(counts.values())}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Its calls as the protocol has them: arguments are JSON in a string."""
        return [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in self.message.get("tool_calls", ())
        ]


def said(form: Format | None, request: ChatRequest, prompt: str, text: str) -> Message:
    """A reply as a message.

    Args:
        form: how calls are written; None: none are read.
        request: what is answered.
        prompt: the end of what the reply stands behind, which may open thinking.
        text: all of the reply that the client sees; what a forced call begins with is part of it.
    """
    closing = open_thinking(prompt)
    places = thinking(text, closing)
    calls = []
    if form is not None:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in request.tools}
        calls = [call for call in formats.read(form, text, closing, schemas) if not call.error]
    answer = without_calls(without_thinking(text, closing), calls).strip() if places or calls else text
    message: Message = {"role": "assistant", "content": answer}
    if places:
        message["reasoning_content"] = "\n".join(_thought(text[start:stop]) for start, stop in places)
    if calls:
        before = sum(len(m.get("tool_calls", ())) for m in request.messages)
        message["tool_calls"] = [
            {
                "id": call.id or f"call{before + i:05d}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(calls)
        ]
    return message


def _thought(text: str) -> str:
    """Thinking without its tags."""
    for opening, closing in THINKING.items():
        text = text.removeprefix(opening).removesuffix(closing)
    return text.strip("\n")


def cut(chat: Chat, completion: Completion, stops: Sequence[str]) -> tuple[Completion, str]:
    """A completion up to the token that completes the first stop sequence, and its text in front of that.

    The tokens that are kept are a beginning of what was sampled, so their log-probabilities are what they were.
    """
    text = chat.text(completion.tokens)
    if not any(stop in text for stop in stops):
        return completion, text
    low, high = 1, len(completion.tokens)
    while low < high:  # the fewest tokens whose text holds a stop sequence
        middle = (low + high) // 2
        held = any(stop in chat.text(completion.tokens[:middle]) for stop in stops)
        low, high = (low, middle) if held else (middle + 1, high)
    updates = tuple(pair for pair in completion.updates if pair[0] < low)
    kept = completion.tokens[:low], completion.logprobs[:low]
    text = chat.text(kept[0])
    at = min(place for stop in stops if (place := text.find(stop)) >= 0)
    return replace(completion, tokens=kept[0], logprobs=kept[1], finish_reason="stop", updates=updates), text[:at]


def whole(answer: Answer, request: ChatRequest, number: str) -> dict[str, Any]:
    """The body of an answer that is no stream."""
    message = {**answer.message, **({"tool_calls": answer.calls} if answer.calls else {})}
    if answer.calls and not message["content"]:
        message["content"] = None
    choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
    return _head(request, number, "chat.completion") | {"choices": [choice], "usage": answer.usage}


def chunks(answer: Answer, request: ChatRequest, number: str) -> Iterator[bytes]:
    """An answer as server-sent events; the whole of it is there before the first goes out."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name in ("reasoning_content", "content"):
        if answer.message.get(name):
            deltas.append({name: answer.message[name]})
    deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(answer.calls)]
    head = _head(request, number, "chat.completion.chunk")
    for delta in deltas:
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
    if request.usage:
        yield _event({**head, "choices": [], "usage": answer.usage})
    yield b"data: [DONE]\n\n"


def _head(request: ChatRequest, number: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}", "object": kind, "created": int(time.time()), "model": request.model}


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
