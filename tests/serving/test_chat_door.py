"""The chat door, by the real openai client, in front of the real built-in engine."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fastmcp
import numpy as np
import openai
import pytest
import torch

from llm_gym.chat import load_chat
from llm_gym.core import Completion, Episode, Ids, Sampling, StopReason
from llm_gym.harness.batching.packing import pack, sequences
from llm_gym.harness.learner import Learner
from llm_gym.policies import make_policy
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.serving.chat import ChatDoor, Endpoint
from llm_gym.serving.chat_sessions import ChatLimits, ChatSession
from llm_gym.serving.visitors import Visitors

LIMITS = ChatLimits(Sampling(max_tokens=24), max_context=2048)
ROOMY = ChatLimits(Sampling(max_tokens=400), max_context=4096)
CALC = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}


@pytest.fixture(scope="module")
def door() -> Iterator[ChatDoor]:
    made = ChatDoor()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    policy = make_policy(None, engine="transformers")
    yield policy
    policy.close()
    torch.set_num_threads(threads)


def session_of(policy: Any, limits: ChatLimits = LIMITS, seed: int = 0) -> ChatSession:
    async def complete(context: Ids, sampling: Sampling, seed: int) -> Completion:
        done: Completion = await policy.complete(context, sampling, seed=seed)
        return done

    return ChatSession(None, complete, limits, seed=seed)


@contextmanager
def entered(door: ChatDoor, policy: Any, **options: Any) -> Iterator[tuple[ChatSession, Endpoint]]:
    session = session_of(policy, **options)
    endpoint = door.open(session)
    try:
        yield session, endpoint
    finally:
        door.leave(endpoint)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def say(client: Any, messages: Sequence[Any], **options: Any) -> dict[str, Any]:
    """A reply as agents put it back: the client's own dump."""
    answer = await client.chat.completions.create(model="any", messages=list(messages), **options)
    return dict(answer.choices[0].message.model_dump(exclude_none=True))


async def streamed(client: Any, messages: Sequence[Any]) -> dict[str, Any]:
    text = ""
    async for chunk in await client.chat.completions.create(model="any", messages=list(messages), stream=True):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    return {"role": "assistant", "content": text}


# Seven kinds of agents. Each asks three questions or more; what a kind does otherwise is what makes it one.


async def plain(client: Any, ask: Any) -> None:
    chat: list[Any] = []
    for _ in range(3):
        chat.append(ask())
        chat.append(await say(client, chat))


async def streaming(client: Any, ask: Any) -> None:
    chat: list[Any] = []
    for _ in range(3):
        chat.append(ask())
        chat.append(await streamed(client, chat))


async def tools(client: Any, ask: Any) -> None:
    """Must call, and sends the arguments back in another form."""
    chat: list[Any] = [ask()]
    for _ in range(3):
        reply = await say(client, chat, tools=[CALC], tool_choice="required")
        calls = reply.get("tool_calls", [])
        for call in calls:
            call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=4)
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "17"} for call in calls]
        chat += [reply, *(results or [ask()])]


async def editing(client: Any, ask: Any) -> None:
    """Takes the last sign off what was said."""
    chat: list[Any] = []
    for _ in range(3):
        chat.append(ask())
        reply = await say(client, chat)
        chat.append({**reply, "content": reply["content"].strip()[:-1]})


async def summarising(client: Any, ask: Any) -> None:
    chat: list[Any] = []
    for turn in range(4):
        chat.append(ask())
        chat.append(await say(client, chat))
        if turn == 1:
            chat = [user("So far: we added numbers.")]


async def branching(client: Any, ask: Any) -> None:
    """Two sub-agents at once, from one beginning, which go on by turns."""
    chat = [ask()]
    chat.append(await say(client, chat))
    branches = [[*chat, ask()], [*chat, ask()]]
    for _ in range(2):
        replies = await asyncio.gather(*(say(client, branch) for branch in branches))
        branches = [[*branch, reply, ask()] for branch, reply in zip(branches, replies, strict=True)]


async def mcp_loop(client: Any, ask: Any) -> None:
    """The tools of a real MCP server, called until the model calls no more."""
    server = fastmcp.FastMCP("sums")

    @server.tool
    def calc(text: str) -> str:
        return f"no sum: {text}"

    chat: list[Any] = [ask()]
    async with fastmcp.Client(server) as mcp:
        found = await mcp.list_tools()
        schemas = [
            {"type": "function", "function": {"name": t.name, "description": "", "parameters": t.input_schema}}
            for t in found
        ]
        for turn in range(3):
            reply = await say(client, chat, tools=schemas, tool_choice="auto" if turn else "required")
            chat.append(reply)
            for call in reply.get("tool_calls", []):
                result = await mcp.call_tool(
                    call["function"]["name"], json.loads(call["function"]["arguments"]), raise_on_error=False
                )
                chat.append({"role": "tool", "tool_call_id": call["id"], "content": result.content[0].text})
            if not reply.get("tool_calls"):
                chat.append(ask())


AGENTS = {
    # agent, share of its turns that went on from an earlier one
    plain: 2 / 3,
    streaming: 2 / 3,
    tools: 2 / 3,
    editing: 0,
    summarising: 2 / 4,
    branching: 3 / 5,
    mcp_loop: 2 / 3,
}


async def play(agent: Any, endpoint: Endpoint, seed: int) -> None:
    rng = np.random.default_rng(seed)
    async with endpoint.client() as client:
        await agent(client, lambda: user(f"What is {rng.integers(10, 99)} + {rng.integers(10, 99)}?"))


def trained(rows: Sequence[Any]) -> list[tuple[int, ...]]:
    """Every token that is trained, behind what it stands behind."""
    return sorted(tuple(row.tokens[: i + 1].tolist()) for row in rows for i in row.trained)


def episode_of(session: ChatSession) -> Episode:
    return Episode("agent", 0, session.trajectories(1.0), StopReason.ANSWERED)


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_what_is_trained_is_what_was_sampled(door: ChatDoor, engine: Any, agent: Any) -> None:
    learner = Learner(engine.model)
    asked: list[tuple[Ids, Completion]] = []
    ask = engine.complete

    class Listening:
        async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
            done: Completion = await ask(context, sampling, seed=seed)
            asked.append((context, done))
            return done

    with entered(door, Listening()) as (session, endpoint):
        asyncio.run(play(agent, endpoint, seed=1))
    episode = episode_of(session)
    rows = sequences(episode)
    got = trained(rows)
    want = sorted((*p.tolist(), *d.tokens[: i + 1].tolist()) for p, d in asked for i in range(len(d.tokens)))
    assert got == want  # each sampled token once, behind what the engine read
    assert episode.reward == 1.0
    assert 1 - len(episode.trajectories) / session.turns == pytest.approx(AGENTS[agent])
    for micro in pack(rows, max_tokens=4096).micro:
        new, _ = learner.logprobs(micro)
        assert float((new - micro.streams["old_logprobs"]).abs().max()) < 1e-3


def test_branches_give_the_same_rows_whichever_way_they_are_played(door: ChatDoor, engine: Any) -> None:
    async def deep(client: Any, ask: Any) -> None:
        chat = [ask()]
        chat.append(await say(client, chat))
        branches = [[*chat, ask()], [*chat, ask()]]
        more = [[ask() for _ in range(2)] for _ in range(2)]  # drawn in the same order as below
        for branch, questions in zip(branches, zip(*more, strict=True), strict=True):
            for question in questions:
                branch.append(await say(client, branch))
                branch.append(question)

    found = []
    for agent in (branching, deep):
        with entered(door, engine) as (session, endpoint):
            asyncio.run(play(agent, endpoint, seed=2))
        rows = sequences(episode_of(session))
        found.append((sorted(r.tokens.tolist() for r in rows), trained(rows)))
        assert len(session.trajectories()) == 2
        own = sum(len(t.tokens) for t in session.trajectories())
        assert own < sum(len(r.tokens) for r in rows)  # the common beginning is there once
    assert found[0] == found[1]


THINKS = "<think>\nSeven and eight.\n</think>\n\nAnswer: 15"


def scripted(*replies: str) -> ScriptedPolicy:
    return ScriptedPolicy(replies, load_chat())


def test_a_reply_that_comes_back_without_its_thinking_is_continued(door: ChatDoor) -> None:
    async def agent(client: Any) -> dict[str, Any]:
        reply = await say(client, [user("7 + 8?")])
        back = {"role": "assistant", "content": f"  {reply['content']}\n"}  # without thinking, with other white space
        await say(client, [user("7 + 8?"), back, user("Sure?")])
        return reply

    with entered(door, scripted(THINKS, "Yes."), limits=ROOMY) as (session, endpoint):
        reply = asyncio.run(with_client(endpoint, agent))
    assert (reply["reasoning_content"], reply["content"]) == ("Seven and eight.", "Answer: 15")
    (trajectory,) = session.trajectories()
    assert THINKS in load_chat().text(trajectory.tokens)


async def with_client(endpoint: Endpoint, agent: Any) -> Any:
    async with endpoint.client() as client:
        return await agent(client)


def asked(door: ChatDoor, policy: Any, limits: ChatLimits = LIMITS, **body: Any) -> tuple[Any, ChatSession]:
    """The answer to one request."""

    async def agent(client: Any) -> Any:
        return await client.chat.completions.create(**{"model": "m", "messages": [user("7 + 8?")]} | body)

    with entered(door, policy, limits=limits) as (session, endpoint):
        return asyncio.run(with_client(endpoint, agent)), session


REFUSED = {
    "two answers": ({"n": 2}, "n"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "a form": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    "log-probabilities": ({"logprobs": True}, "logprobs"),
    "a call without tools": ({"tool_choice": "required"}, "tool_choice"),
    "an unknown tool": (
        {"tools": [CALC], "tool_choice": {"type": "function", "function": {"name": "calk"}}},
        "tool_choice",
    ),
    "tools that are none": ({"tools": [{"name": "calc"}]}, "tools"),
    "five stops": ({"stop": list("abcde")}, "stop"),
    "no tokens": ({"max_tokens": 0}, "max_completion_tokens"),
    "no messages": ({"messages": []}, "messages"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    "an image": ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "messages"),  # type: ignore[arg-type]
    "too long a chat": ({"messages": [user("word " * 3000)]}, "messages"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_had_is_refused_in_openais_form(door: ChatDoor, what: str) -> None:
    body, param = REFUSED[what]
    with pytest.raises(openai.BadRequestError) as error:
        asked(door, scripted("Answer: 15"), **body)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert param in error.value.message or error.value.code == "context_length_exceeded"


def test_ignored_settings_change_nothing(door: ChatDoor, engine: Any) -> None:
    plain, _ = asked(door, engine)
    hot, _ = asked(door, engine, temperature=0.01, top_p=0.1, seed=7, presence_penalty=1.0, user="me", store=True)
    assert hot.choices[0].message == plain.choices[0].message


def test_a_stop_sequence_cuts_what_is_said_and_what_is_trained(door: ChatDoor) -> None:
    answer, session = asked(door, scripted("7+8=15. Answer: 15"), stop=["Ans", "zzz"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("7+8=15. ", "stop")
    (trajectory,) = session.trajectories()
    kept = load_chat().text(trajectory.tokens[trajectory.sampled])
    assert "Ans" in kept
    assert "Answer: 15" not in kept
    assert answer.usage.completion_tokens == len(trajectory.sampled)


def test_a_limit_of_tokens_is_the_smaller_one(door: ChatDoor) -> None:
    answer, _ = asked(door, scripted("7+8=15. Answer: 15"), max_completion_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    answer, _ = asked(door, scripted("1+2=3. " * 40), max_tokens=4000)
    assert answer.usage.completion_tokens == LIMITS.sampling.max_tokens


CALL = '<tool_call>\n{"name": "calc", "arguments": {"text": "7+8"}}\n</tool_call>'


def test_parallel_calls_are_read_and_none_of_them_where_none_is_wanted(door: ChatDoor) -> None:
    answer, _ = asked(door, scripted(f"Two sums.\n{CALL}\n{CALL}"), ROOMY, tools=[CALC])
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "Two sums."
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"text": "7+8"}] * 2
    assert len({call.id for call in message.tool_calls}) == 2
    answer, _ = asked(door, scripted(CALL), ROOMY, tools=[CALC], tool_choice="none")
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (CALL, None)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calc"}}])
def test_a_forced_call_begins_in_the_context_and_is_not_trained(door: ChatDoor, choice: Any) -> None:
    rest = ' {"text": "7+8"}}\n</tool_call>'
    answer, session = asked(door, scripted(rest), ROOMY, tools=[CALC], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("calc", {"text": "7+8"})
    (trajectory,) = session.trajectories()
    text = load_chat().text(trajectory.tokens)
    assert '<tool_call>\n{"name": "calc", "arguments":' + rest in text
    assert load_chat().text(trajectory.tokens[trajectory.sampled]) == rest


def test_a_stream_ends_with_its_counts_if_they_are_asked_for(door: ChatDoor) -> None:
    async def agent(client: Any) -> list[Any]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return [c async for c in await client.chat.completions.create(model="m", messages=[user("hi")], **options)]

    with entered(door, scripted("Answer: 15")) as (session, endpoint):
        chunks = asyncio.run(with_client(endpoint, agent))
    assert chunks[-1].usage.completion_tokens == len(session.last.tokens)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


class Holding:
    """A policy that answers when it is told to."""

    def __init__(self) -> None:
        self.inner, self.asked, self.go = scripted("Answer: 15"), asyncio.Event(), asyncio.Event()
        self.cancelled = asyncio.Event()

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        self.asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await self.inner.complete(context, sampling)


def raw_request(endpoint: Endpoint, **body: Any) -> socket.socket:
    port = int(endpoint.base_url.split(":")[2].split("/")[0])
    text = json.dumps({"model": "m", "messages": [user("7 + 8?")], **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.api_key}\r\n"
    made = socket.create_connection(("127.0.0.1", port))
    made.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
    return made


def test_a_client_that_hangs_up_ends_its_request_and_leaves_the_next_turn_right() -> None:
    """In the test's own loop, so that what happens when is known."""
    door = ChatDoor()
    policy = Holding()
    try:
        with entered(door, policy) as (session, endpoint):
            dying = raw_request(endpoint, stream=True)
            door.loop.run(policy.asked.wait())
            dying.close()
            door.loop.run(policy.cancelled.wait())
            assert session.turns == 0
            policy.go.set()
            asyncio.run(with_client(endpoint, lambda client: say(client, [user("7 + 8?")])))
        (trajectory,) = session.trajectories()
        assert [span.turn for span in trajectory.spans] == [0]
    finally:
        door.close()


def test_without_an_open_session_there_is_no_answer(door: ChatDoor) -> None:
    with entered(door, scripted("Answer: 15")) as (session, endpoint):
        assert asyncio.run(with_client(endpoint, models)) == ["policy"]
    for gone in (endpoint, Endpoint(endpoint.base_url, "guess")):
        for request in (lambda client: say(client, [user("hi")]), models):
            with pytest.raises(openai.AuthenticationError):
                asyncio.run(with_client(gone, request))
    assert session.turns == 0


async def models(client: Any) -> list[str]:
    return [model.id async for model in client.models.list()]


def test_turns_are_bounded(door: ChatDoor) -> None:
    async def agent(client: Any) -> None:
        for _ in range(3):
            await say(client, [user("7 + 8?")])

    with (
        entered(door, scripted("Answer: 15"), limits=ChatLimits(Sampling(max_tokens=24), 2048, max_turns=2)) as (
            session,
            endpoint,
        ),
        pytest.raises(openai.BadRequestError, match="All 2 completions"),
    ):
        asyncio.run(with_client(endpoint, agent))
    assert (session.turns, session.ended) == (2, StopReason.TURN_LIMIT)


def test_a_policy_that_fails_is_asked_once(door: ChatDoor) -> None:
    calls = []

    class Broken:
        async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
            calls.append(1)
            raise RuntimeError("no memory")

    session = session_of(Broken())
    endpoint = door.open(session)
    client = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=5)
    with client, pytest.raises(openai.InternalServerError, match="no memory"):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert (len(calls), str(session.failure[0])) == (1, "no memory")


def test_the_same_question_twice_is_answered_twice(door: ChatDoor, engine: Any) -> None:
    async def agent(client: Any) -> list[Any]:
        return await asyncio.gather(*(say(client, [user("What is 57 + 86?")]) for _ in range(8)))

    with entered(door, engine) as (session, endpoint):
        replies = asyncio.run(with_client(endpoint, agent))
    assert len({reply["content"] for reply in replies}) > 1
    assert len(sequences(episode_of(session))) == 8


def test_200_sessions_at_once(door: ChatDoor) -> None:
    async def one(endpoint: Endpoint, number: int) -> list[Any]:
        chat: list[Any] = []
        async with endpoint.client() as client:
            for turn in range(2):
                chat.append(user(f"{number}, {turn}"))
                chat.append(await say(client, chat))
        return chat

    async def every() -> list[list[Any]]:
        return await asyncio.gather(*(one(endpoint, i) for i, (_, endpoint) in enumerate(held)))

    policy = ScriptedPolicy(
        lambda context: load_chat().text(context[-24:]).split("user\n")[-1].split("<")[0], load_chat()
    )
    held = []
    for _ in range(200):
        session = session_of(policy)
        held.append((session, door.open(session)))
    chats = asyncio.run(every())
    for number, (chat, (session, endpoint)) in enumerate(zip(chats, held, strict=True)):
        assert [m["content"] for m in chat if m["role"] == "assistant"] == [f"{number}, {turn}" for turn in range(2)]
        assert len(session.trajectories()) == 1
        door.leave(endpoint)
    assert door.sessions <= 1  # one of another test's


def test_a_visitors_session_ends_when_nothing_is_asked_any_more() -> None:
    ended: list[ChatSession] = []
    made: list[ChatSession] = []

    def visitor(key: str) -> ChatSession | None:
        if key != "mine":
            return None
        made.append(session_of(scripted("Answer: 15")))
        return made[-1]

    door = ChatDoor(visitors=Visitors(visitor, idle=0.05, ended=ended.append))
    mine = Endpoint(f"{door.url}/v1", "mine")
    try:
        with pytest.raises(openai.AuthenticationError):
            asyncio.run(with_client(Endpoint(f"{door.url}/v1", "yours"), models))
        asyncio.run(with_client(mine, lambda client: say(client, [user("7 + 8?")])))
        while not ended:
            time.sleep(0.01)
        asyncio.run(with_client(mine, lambda client: say(client, [user("7 + 8?")])))
    finally:
        door.close()
    assert ended == made
    assert [session.turns for session in made] == [1, 1]


def test_a_visitor_without_a_key_is_refused() -> None:
    """What a page in a browser can send on its own."""
    door = ChatDoor(visitors=Visitors(lambda key: session_of(scripted("Answer: 15")), idle=60, ended=lambda _: None))
    try:
        request = urllib.request.Request(f"{door.url}/v1/chat/completions", b'{"messages": []}', {"Origin": "http://x"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)
    finally:
        door.close()


def test_no_visitor_is_idle_while_a_completion_is_sampled() -> None:
    policy, ended = Holding(), list[ChatSession]()
    door = ChatDoor(visitors=Visitors(lambda key: session_of(policy), idle=0.02, ended=ended.append))

    async def agent(client: Any) -> str:
        asked = asyncio.ensure_future(say(client, [user("7 + 8?")]))
        await asyncio.wrap_future(door.loop.submit(policy.asked.wait()))
        await asyncio.sleep(0.1)  # several times as long as a visitor may be idle
        assert not ended
        door.loop.run(_set(policy.go))
        return str((await asked)["content"])

    try:
        assert asyncio.run(with_client(Endpoint(f"{door.url}/v1", "mine"), agent)) == "Answer: 15"
    finally:
        door.close()


async def _set(event: asyncio.Event) -> None:
    event.set()
