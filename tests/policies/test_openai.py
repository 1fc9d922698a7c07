"""Text-only endpoints: what is sent, how replies are encoded, and that nothing can be trained on them."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.concurrency import Loop
from llm_gym.core import Completion, Sampling, StopReason
from llm_gym.envs.tools.parsers.formats import tool_chat
from llm_gym.errors import ConfigError, PolicyError, SettingError
from llm_gym.policies import make_policy
from llm_gym.policies.openai import OpenAIPolicy
from llm_gym.rollouts.driver import rollout

MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]


class Endpoint:
    """`/v1/chat/completions` that says what it is told to, one answer after another."""

    def __init__(self) -> None:
        self.answers: deque[Any] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._loop, self._port = Loop("endpoint"), 0
        self.come()

    def come(self) -> None:
        """Answers, where it did before."""
        self._loop.run(self._start())

    def leave(self) -> None:
        """Is not there."""
        self._loop.run(self._runner.cleanup())

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}/v1"

    async def _chat(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        answer = self.answers.popleft() if self.answers else said("4")
        if isinstance(answer, int):
            return web.json_response({"error": {"message": "it says why"}}, status=answer)
        return web.json_response(answer)

    def stop(self) -> None:
        self.leave()
        self._loop.stop()


def said(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.stop()


@pytest.fixture
def policy(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIPolicy]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = OpenAIPolicy("some-model", base_url=endpoint.url)
    yield engine
    engine.close()


def reply(policy: OpenAIPolicy, messages: Any = MESSAGES, tools: Any = None, **sampling: Any) -> Completion:
    return asyncio.run(policy.reply(messages, load_chat(None, tools), Sampling(**sampling), seed=2**64 - 1))


def test_a_reply_is_encoded_as_if_it_had_been_sampled(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    completion = reply(policy, max_tokens=9)
    assert completion.tokens.tolist() == load_chat().encode_reply("4").tolist()
    assert completion.finish_reason == "stop"
    assert np.isnan(completion.logprobs).all()
    assert endpoint.bodies == [
        {"model": "some-model", "messages": MESSAGES, "temperature": 1.0, "max_tokens": 9, "seed": 2**63 - 1}
    ]
    assert endpoint.keys == ["Bearer secret"]


def test_what_was_cut_has_no_stop_token(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    endpoint.answers.extend([said("12", "length"), said("1234567890")])
    whole = load_chat().encode_reply("12")
    assert reply(policy).tokens.tolist() == whole[:-1].tolist()
    short = reply(policy, max_tokens=3)
    assert (len(short.tokens), short.finish_reason) == (3, "length")


def test_only_what_is_asked_for_is_sent(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    reply(policy, temperature=0.0, top_k=5, top_p=0.9, min_p=0.1)
    assert {k: endpoint.bodies[0][k] for k in ("temperature", "top_k", "top_p", "min_p")} == {
        "temperature": 0.0,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
    }


def test_tools_in_words_are_said_to_it_too(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    """It knows nothing of the format asked for, and would call tools in its own way."""
    schema = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    tool = {"type": "function", "function": {"name": "run", "description": "Runs it.", "parameters": schema}}
    chat, _ = tool_chat(load_tokenizer(), [tool], "python_block")
    call = {"id": "c", "type": "function", "function": {"name": "run", "arguments": {"code": "2+2"}}}
    said = {"role": "assistant", "content": "So:", "tool_calls": [call]}
    messages = [*MESSAGES, said, {"role": "tool", "name": "run", "tool_call_id": "c", "content": "4"}]
    asyncio.run(policy.reply(messages, chat, Sampling(), seed=0))
    (body,) = endpoint.bodies
    assert "tools" not in body
    told, *rest = body["messages"]
    assert told["role"] == "system"
    assert "Runs it." in told["content"]
    assert rest[len(MESSAGES) :] == [
        {"role": "assistant", "content": "So:\n```python\n2+2\n```"},
        {"role": "user", "content": "```output\n4\n```"},
    ]


def test_tool_calls_go_both_ways(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    endpoint.answers.append(said(None, "tool_calls", tool_calls=[call]))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    as_objects = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [as_objects]}]
    text = load_chat(None, tools).text(reply(policy, messages, tools).tokens)
    assert json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")) == {
        "name": "add",
        "arguments": {"a": 1},
    }
    assert endpoint.bodies[0]["tools"] == tools
    assert endpoint.bodies[0]["messages"][1]["tool_calls"] == [call]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # the environment's own, untouched


@pytest.mark.parametrize("failure", [500, 429, {}, {"choices": [{"message": None}]}])
def test_what_may_pass_is_repeated(policy: OpenAIPolicy, endpoint: Endpoint, failure: Any) -> None:
    endpoint.answers.append(failure)
    assert len(reply(policy).tokens) > 0
    assert endpoint.bodies[0] == endpoint.bodies[1]


def test_a_refused_request_is_data_and_a_refused_key_a_setting(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    endpoint.answers.extend([400, 401])
    with pytest.raises(PolicyError, match="it says why"):
        reply(policy)
    with pytest.raises(ConfigError, match="it says why"):
        reply(policy)


def test_failing_for_too_long_is_data(endpoint: Endpoint) -> None:
    engine = OpenAIPolicy("m", base_url=endpoint.url, retry_seconds=0.0)
    endpoint.answers.extend([500] * 3)
    with pytest.raises(PolicyError, match="500"):
        reply(engine)
    engine.close()
    engine.close()


def test_an_address_where_nobody_is_is_a_setting_and_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = OpenAIPolicy("m", base_url="http://127.0.0.1:1/v1", start_seconds=0.5, retry_seconds=2)
    with pytest.raises(ConfigError, match=r"base_url: no answer for 0\.5 s .*127\.0\.0\.1:1"):
        rollout("GuessNumber-v0", engine, seeds=range(3))
    engine.close()
    assert "trying for" in caplog.records[0].getMessage()


def test_an_endpoint_that_has_answered_may_be_away_for_longer(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Its retry_seconds count then."""
    engine = OpenAIPolicy("m", base_url=endpoint.url, start_seconds=0.0, retry_seconds=10_000)
    chat = load_chat()

    async def both() -> list[Completion]:
        first = await engine.reply(MESSAGES, chat, Sampling(), seed=0)
        endpoint.leave()
        second = asyncio.ensure_future(engine.reply(MESSAGES, chat, Sampling(), seed=0))
        while not caplog.records:
            await asyncio.sleep(0.01)
        endpoint.come()
        return [first, await second]

    first, second = asyncio.run(both())
    assert first.tokens.tolist() == second.tokens.tolist()
    engine.close()


def test_an_error_is_an_answer(endpoint: Endpoint) -> None:
    endpoint.answers.append(500)
    engine = OpenAIPolicy("m", base_url=endpoint.url, start_seconds=0.0)
    assert len(reply(engine).tokens)
    engine.close()


def test_episodes_are_played_with_messages(policy: OpenAIPolicy, endpoint: Endpoint) -> None:
    episodes = rollout("GuessNumber-v0", policy, seeds=range(3), env_args={"max_turns": 2})
    for episode in episodes:
        assert episode.stop_reason in (StopReason.ANSWERED, StopReason.TURN_LIMIT), episode.error
        assert episode.messages[1] == {"role": "assistant", "content": "4"}
    longest = max(endpoint.bodies, key=lambda body: len(body["messages"]))
    assert [message["role"] for message in longest["messages"]] == ["user", "assistant", "user"]


def test_training_is_refused_in_one_sentence(policy: OpenAIPolicy) -> None:
    for refused in (
        lambda: policy.load([], version=1),
        lambda: policy.generate([], Sampling()),
        lambda: asyncio.run(policy.complete(np.zeros(1, np.int32), Sampling())),
    ):
        with pytest.raises(SettingError, match=r"text only.*cannot be trained"):
            refused()


@pytest.mark.parametrize("bad", [{"model": None}, {"base_url": "localhost"}, {"base_uri": "http://x"}])
def test_settings_that_cannot_work(bad: dict[str, Any]) -> None:
    settings = {"model": "m", **bad}
    with pytest.raises(SettingError, match=next(iter(bad))):
        make_policy(settings.pop("model"), engine="openai", **settings)
