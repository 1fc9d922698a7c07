"""What clients of the chat door may send that is odd, wrong or huge, and what they change in a chat that goes on."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.core import Completion, Ids, Sampling, StopReason
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.serving.chat import ChatDoor
from llm_gym.serving.chat_requests import Refused, read_request
from llm_gym.serving.chat_sessions import ChatLimits, ChatSession

TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "calc", "arguments": {"text": "7+8"}}\n</tool_call>'
LIMITS = ChatLimits(Sampling(max_tokens=400), max_context=4096)


def session_of(*replies: Any, limits: ChatLimits = LIMITS) -> ChatSession:
    policy = ScriptedPolicy(replies, load_chat())

    async def complete(context: Ids, sampling: Sampling, seed: int) -> Completion:
        return await policy.complete(context, sampling, seed=seed)

    return ChatSession(None, complete, limits)


RUN = {
    "type": "function",
    "function": {
        "name": "run",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(session: ChatSession, messages: list[Any], **options: Any) -> dict[str, Any]:
    """The reply, as a client has it that sends back what it got."""
    answer, _ = asyncio.run(session.answer(read_request({"messages": messages, **options})))
    return {**answer.message, **({"tool_calls": answer.calls} if answer.calls else {})}


@pytest.fixture(scope="module")
def door() -> Iterator[ChatDoor]:
    made = ChatDoor()
    yield made
    made.close()


def post(door: ChatDoor, session: ChatSession, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    endpoint = door.open(session)
    connection = http.client.HTTPConnection("127.0.0.1", door.port)
    try:
        head = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json", **headers}
        connection.request("POST", "/v1/chat/completions", body, head)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()
        door.leave(endpoint)


PLAIN = json.dumps({"messages": [user("7 + 8?")]}).encode()
UNREADABLE = {
    "no JSON": (b"{", {}),
    "too deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}),
    "no UTF-8": ('{"messages": "\u00e9"}'.encode("latin-1"), {}),
    "not compressed": (PLAIN, {"Content-Encoding": "gzip"}),
    "a role that is a list": (b'{"messages": [{"role": [], "content": ""}]}', {}),
    "a chat that is a text": (b'{"messages": "hi"}', {}),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_refused_in_openais_form(door: ChatDoor, what: str) -> None:
    body, headers = UNREADABLE[what]
    status, answer = post(door, session_of("Answer: 15"), body, **headers)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_is_utf_8_whatever_its_header_says(door: ChatDoor) -> None:
    status, answer = post(door, session_of("Answer: 15"), PLAIN, **{"Content-Type": "application/json; charset=odd"})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Answer: 15")


def test_a_fault_of_ours_is_said_in_openais_form_and_leaves_nothing(door: ChatDoor) -> None:
    async def complete(context: Ids, sampling: Sampling, seed: int) -> Any:
        return None

    session = ChatSession(None, complete, LIMITS)
    status, answer = post(door, session, PLAIN)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "The endpoint failed" in answer["error"]["message"]
    assert session.turns == 0


def test_a_chat_beyond_every_tokenisation_is_refused_before_it_is_tokenised() -> None:
    session = session_of("Answer: 15", limits=ChatLimits(Sampling(max_tokens=8), max_context=64))
    with pytest.raises(Refused, match="1000000 characters") as refused:
        ask(session, [user("word " * 200_000)])
    assert (refused.value.code, session.ended) == ("context_length_exceeded", StopReason.TOKEN_LIMIT)
    assert (
        ask(session, [user("word " * 20)])["content"] == "Answer: 15"
    )  # more characters than tokens may be: no matter


def test_a_form_in_json_is_taken_and_not_enforced() -> None:
    reply = ask(session_of('{"answer": 15}'), [user("As JSON: 7 + 8?")], response_format={"type": "json_object"})
    assert reply["content"] == '{"answer": 15}'


def renamed(chat: list[Any], time: int) -> list[Any]:
    """The chat with other ids of its calls."""
    text = json.dumps(chat)
    for number in range(9):
        for before in (f'"call{number:05d}"', f'"id{number}-{time - 1}"'):
            text = text.replace(before, f'"id{number}-{time}"')
    return list(json.loads(text))


def test_a_call_is_forced_that_is_a_block_of_code() -> None:
    """As templates without tools have it, for a tool that runs code: such a call has no name."""
    tokenizer = load_tokenizer(None, "plain")
    policy = ScriptedPolicy(["print(7 + 8)\n```"], load_chat(tokenizer))

    async def complete(context: Ids, sampling: Sampling, seed: int) -> Completion:
        return await policy.complete(context, sampling)

    session = ChatSession(tokenizer, complete, LIMITS)
    reply = ask(session, [user("7 + 8?")], tools=[RUN], tool_choice="required")
    (call,) = reply["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"code": "print(7 + 8)"}
    (trajectory,) = session.trajectories()
    assert load_chat(tokenizer).text(trajectory.tokens[trajectory.sampled]).startswith("print")


def test_ids_that_a_client_makes_anew_each_time_change_nothing() -> None:
    session = session_of(CALL + CALL, CALL, "Answer: 15")
    chat: list[Any] = [user("7 + 8?")]
    for time in range(3):
        reply = ask(session, chat, tools=[TOOL])
        calls = reply.get("tool_calls", [])
        results = [{"role": "tool", "tool_call_id": call["id"], "content": f"{i}"} for i, call in enumerate(calls)]
        chat = renamed([*chat, reply, *results], time)
    assert [len(t.spans) for t in session.trajectories()] == [3]


def test_results_given_to_each_others_calls_are_another_chat() -> None:
    session = session_of(CALL + CALL, "One.", "Two.")
    reply = ask(session, [user("7 + 8?")], tools=[TOOL])
    first, second = (call["id"] for call in reply["tool_calls"])
    for ids in ((first, second), (second, first)):
        results = [{"role": "tool", "tool_call_id": id, "content": text} for id, text in zip(ids, "ab", strict=True)]
        chat = [user("7 + 8?"), reply, *results]
        said = ask(session, chat, tools=[TOOL])
        assert said["content"] == ("One." if ids == (first, second) else "Two.")
    ask(session, [*chat, {"role": "assistant", "content": "Two."}, user("So?")], tools=[TOOL])
    (one, two) = session.trajectories()
    assert [len(one.spans), len(two.spans)] == [2, 2]


STOPPED = {
    # what is sampled, stop sequences, what is heard, what is trained
    "the first that is complete": ("abzzc", ["abzzc", "zz"], "ab", "abzz"),
    "inside a sign of several tokens": ("a \U0001f600 b", ["\U0001f600"], "a ", "a \U0001f600"),
    "inside thinking": ("<think>so be it</think>no", ["be"], "", "<think>so be"),
}


@pytest.mark.parametrize("what", STOPPED)
def test_a_stop_sequence_cuts_where_an_engine_would(what: str) -> None:
    sampled, stops, heard, trained = STOPPED[what]
    chat = load_chat()
    pieces = [piece for sign in sampled for piece in chat.encode_reply(sign)[:-1]]  # a token for each sign, or more
    session = session_of(np.array([*pieces, chat.stop_ids[0]], np.int32))
    assert ask(session, [user("Go.")], stop=stops)["content"] == heard
    (trajectory,) = session.trajectories()
    assert chat.text(trajectory.tokens[trajectory.sampled]) == trained


def test_a_session_that_has_ended_does_not_change_any_more() -> None:
    go = asyncio.Event()
    policy = ScriptedPolicy(["Answer: 15"], load_chat())

    async def complete(context: Ids, sampling: Sampling, seed: int) -> Completion:
        if session.turns:
            await go.wait()
        return await policy.complete(context, sampling)

    session = ChatSession(None, complete, LIMITS)

    async def late() -> None:
        request = read_request({"messages": [user("7 + 8?")]})
        _, reply = await session.answer(request)
        under_way = asyncio.ensure_future(session.answer(request))
        await asyncio.sleep(0)
        session.close()
        go.set()
        with pytest.raises(Refused, match="over"):
            await under_way
        session.forget(reply)

    asyncio.run(late())
    assert (session.turns, len(session.trajectories())) == (1, 1)
