"""OpenEnv's own client at our server, and our client at servers that their package makes (version 0.10)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gymnasium as gym
import pytest

import llm_gym
from llm_gym.concurrency import Loop
from llm_gym.core import StopReason
from llm_gym.errors import ConfigError, LLMGymError
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.serving.environments import EnvDoor

try:
    import uvicorn
    from openenv.core.env_server.http_server import create_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State
    from openenv.core.generic_client import GenericEnvClient
except ImportError:  # pragma: no cover
    pytest.skip("needs the package `openenv`, which `make test` installs", allow_module_level=True)

pytestmark = pytest.mark.heavy


# Their client


def test_their_client_wins_a_game() -> None:
    async def play(url: str) -> tuple[Any, Any]:
        async with GenericEnvClient(base_url=url) as client:
            result = await client.reset(seed=7, episode_id="one")
            assert "Guess my number" in result.observation["messages"][0]["content"]
            low, high = 1, 100
            while not result.done:
                result = await client.step({"text": f"{(low + high) // 2}"})
                middle, words = (low + high) // 2, [m["content"] for m in result.observation["messages"]]
                low, high = (middle + 1, high) if words == ["higher"] else (low, middle - 1)
            return result, await client.state()

    with EnvDoor("GuessNumber-v0", port=0) as server:
        result, state = asyncio.run(play(server.url))
        assert (result.reward, result.done) == (1.0, True)
        end = {"rewards": {"found": 1.0}, "truncated": False, "stop_reason": "answered"}
        assert result.observation.items() >= end.items()
        assert result.metadata == end
        assert state["episode_id"] == "one"
        assert state["step_count"] >= 1


def test_their_client_uses_a_tool_and_is_refused_a_step_after_the_end() -> None:
    with EnvDoor("PythonTool-v0", port=0) as server, GenericEnvClient(base_url=server.url).sync() as client:
        seen = client.reset(seed=1).observation
        assert seen["tools"][0]["function"]["name"] == "python"
        assert seen["tool_format"] == "hermes"
        a, op, b = re.search(r"(\d+) ([-+*]) (\d+)", seen["messages"][0]["content"]).groups()  # type: ignore[union-attr]
        call = f'<tool_call>\n{{"name": "python", "arguments": {{"code": "print({a} {op} {b})"}}}}\n</tool_call>'
        (answer,) = client.step({"text": call}).observation["messages"]
        assert answer["role"] == "tool"
        result = client.step({"text": f"Answer: {answer['content']}"})
        assert (result.reward, result.done) == (1.0, True)
        with pytest.raises(RuntimeError, match="the episode is over"):
            client.step({"text": "again"})
        assert client.reset(seed=1).observation["messages"] == seen["messages"]


def test_their_client_is_told_that_the_server_is_full() -> None:
    with EnvDoor("GuessNumber-v0", port=0, max_sessions=1, token="s3cret") as server:
        headers = {"Authorization": "Bearer s3cret"}
        with GenericEnvClient(base_url=server.url, headers=headers).sync() as client:
            client.reset(seed=1)
            second = GenericEnvClient(base_url=server.url, headers=headers).sync()
            with second, pytest.raises(RuntimeError, match=r"server is full.*CAPACITY_REACHED"):
                second.reset(seed=1)
        with pytest.raises(ConnectionError, match="401"), GenericEnvClient(base_url=server.url).sync():
            pass


# Their servers


class Say(Action):
    message: str


class Heard(Observation):
    heard: str = ""
    count: int = 0


class Echo(Environment[Say, Heard, State]):
    """Says what it hears, three times."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, start: int = 0, **kwargs: Any) -> Heard:
        self.count = start
        return Heard(heard=f"Hello {seed}!", count=start)

    def step(self, action: Say, timeout_s: float | None = None, **kwargs: Any) -> Heard:
        if action.message == "break":
            raise RuntimeError("it broke")
        self.count += 1
        return Heard(heard=action.message, count=self.count, reward=len(action.message) / 10, done=self.count >= 3)

    @property
    def state(self) -> State:
        return State(step_count=self.count)


class Move(Action):
    x: int
    y: int


class Board(Observation):
    board: str = ""
    truncated: bool = False


class Moves(Environment[Move, Board, State]):
    """A field to go to."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Board:
        self.turns = 0
        return Board(board="Go to 1, 2.")

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Board:
        self.turns += 1
        won = (action.x, action.y) == (1, 2)
        return Board(board="no", reward=1 if won else None, done=won or self.turns == 3, truncated=not won)

    @property
    def state(self) -> State:
        return State()


@contextmanager
def theirs(env: Any, action: Any, observation: Any, most: int = 8) -> Iterator[str]:
    """The URL of a server of their package."""
    app = create_app(env, action, observation, max_concurrent_envs=most)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    loop = Loop("theirs")

    async def start() -> int:
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.lifespan.startup()
        await server.startup()
        return int(server.servers[0].sockets[0].getsockname()[1])

    async def end() -> None:
        while server.server_state.connections:  # one that is being closed may not be closed again
            await asyncio.sleep(0.01)
        await server.shutdown()

    try:
        yield f"http://127.0.0.1:{loop.run(start())}"
    finally:
        loop.run(end())
        loop.stop()


def test_our_client_plays_theirs_many_at_once() -> None:
    with theirs(Echo, Say, Heard) as url:
        policy = ScriptedPolicy(["four"], llm_gym.load_chat())
        args = {"url": url, "prompt": "{heard} ({count})"}
        episodes = llm_gym.rollout("OpenEnv-v0", policy, seeds=range(8), env_args=args)
        assert [e.messages[0]["content"] for e in episodes] == [f"Hello {seed}! (0)" for seed in range(8)]
        assert {(len(e.turns), e.stop_reason, round(e.reward, 6)) for e in episodes} == {(3, StopReason.ANSWERED, 1.2)}
        env = gym.make("llm_gym/OpenEnv-v0", url=url, reset={"start": 2})
        chat = env.unwrapped.chat
        assert env.reset(seed=5)[1]["messages"] == [{"role": "user", "content": "heard: Hello 5!\ncount: 2"}]
        with pytest.raises(LLMGymError, match="it broke"):
            env.step(chat.encode_reply("break"))
        env.reset(seed=5)
        assert env.step(chat.encode_reply("x"))[4]["rewards"] == {"reward": 0.1, "format": 0.0}
        env.close()
        for wrong, said in (({"action": "mesage"}, "did you mean 'message'"), ({"prompt": "{herd}"}, "mean 'heard'")):
            with pytest.raises(ConfigError, match=said):
                gym.make("llm_gym/OpenEnv-v0", url=url, **wrong)


def test_actions_of_several_fields_are_json() -> None:
    with theirs(Moves, Move, Board) as url:
        env = gym.make("llm_gym/OpenEnv-v0", url=url)
        chat = env.unwrapped.chat

        def say(text: str) -> tuple[float, bool, bool, dict[str, Any]]:
            _, reward, terminated, truncated, info = env.step(chat.encode_reply(text))
            return float(reward), terminated, truncated, info

        (first,) = env.reset(seed=1)[1]["messages"]
        assert first["content"].startswith("Go to 1, 2.\n\nReply with one JSON object: ")
        reward, *_, info = say("no idea")
        assert reward == pytest.approx(-0.1)
        assert "JSON object" in info["messages"][-1]["content"]
        assert "x: Input should be a valid integer" in say('{"x": "left", "y": 2}')[3]["messages"][-1]["content"]
        assert say('I go {"x": 1, "y": 2} now')[:3] == (1.0, True, False)
        env.reset(seed=1)
        for _ in range(3):
            end = say('{"x": 0, "y": 0}')
        assert end[:3] == (0.0, False, True)
        env.close()


def test_their_full_server_ends_the_episode() -> None:
    with theirs(Echo, Say, Heard, most=1) as url, ExitStack() as stack:
        one, two = (stack.enter_context(gym.make("llm_gym/OpenEnv-v0", url=url)) for _ in range(2))
        one.reset(seed=1)
        with pytest.raises(LLMGymError, match="at capacity"):
            two.reset(seed=1)
