"""Environments over the wire: the same episodes as in this process, and what a server refuses. All servers are real."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import gymnasium as gym
import numpy as np
import psutil
import pytest

import llm_gym
from llm_gym import Reply, TextEnv
from llm_gym.core import Completion, Episode, Ids, Sampling, StopReason
from llm_gym.envs.asynchronous import reset_async, step_async
from llm_gym.envs.tools import ToolEnv
from llm_gym.errors import BadReply, ConfigError, SettingError, ToolFailure
from llm_gym.rollouts.driver import Driver
from llm_gym.serving.environments import EnvDoor
from llm_gym.testing import check_environment

PATIENCE = 30.0


class Says:
    """A policy whose replies are a function of the request's seed; now and then one that is cut."""

    version = 0

    def __init__(self, replies: list[str], cut: int = 0) -> None:
        self.chat, self.replies, self.cut = llm_gym.load_chat(), replies, cut

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        assert seed is not None
        await asyncio.sleep(0)
        ids = self.chat.encode_reply(self.replies[seed % len(self.replies)])
        if self.cut and seed % 5 == 0:
            ids = np.resize(ids[:-1], sampling.max_tokens).astype(np.int32)
        return Completion(ids, np.zeros(len(ids), np.float32), "length" if self.cut and seed % 5 == 0 else "stop")


def plain(episode: Episode) -> Any:
    """All that an episode is, but the environment's name and the time it took."""
    turns = [(t.prompt.tolist(), t.completion.tokens.tolist(), t.reward) for t in episode.turns]
    end = (episode.stop_reason, dict(episode.rewards), episode.reward, episode.error)
    return episode.seed, episode.member, episode.task, list(episode.messages), turns, end


def both(env: Any, policy: Says, *, args: Any = None, here: Any = None, seeds: int = 12, **how: Any) -> list[Episode]:
    """The episodes of an environment here and over the wire, which must be the same; `here` are arguments of both."""
    args, here = args or {}, here or {}
    rows = [seed % 3 for seed in range(seeds)] if how.pop("rows", False) else None
    with Driver(env, policy, env_args={**args, **here}, **how) as driver:
        played = driver.run(range(seeds), group_size=2, rows=rows)
    with EnvDoor(env, env_args=args, port=0) as server:
        with Driver("OpenEnv-v0", policy, env_args={"url": server.url, **here}, **how) as driver:
            there = driver.run(range(seeds), group_size=2, rows=rows)
        eventually(lambda: server.sessions == 0)
    assert [plain(a) for a in played] == [plain(b) for b in there]
    return there


def eventually(holds: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


GUESSES = ["50", "I say 25.", "75", "12", "no idea", "37", "62", "88", "ünïcode \U0001f600 <|im_end|> 5", ""]


def test_a_thousand_sessions_on_one_connection() -> None:
    policy, turns = Says(GUESSES), {"max_turns": 2}
    threads = threading.active_count()
    with Driver("GuessNumber-v0", policy, env_args=turns, max_concurrent=1000) as driver:
        here = driver.run(range(1000))
    with (
        EnvDoor("GuessNumber-v0", env_args=turns, port=0) as server,
        Driver("OpenEnv-v0", policy, env_args={"url": server.url}, max_concurrent=1000) as driver,
    ):
        there = driver.run(range(1000))
        assert server.sessions == 1000
        lines = [c for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == server.port]
        assert len(lines) == 1
        assert threading.active_count() <= threads + 2  # the server's and the connection's
    assert [plain(a) for a in here] == [plain(b) for b in there]
    assert {e.stop_reason for e in there} == {StopReason.ANSWERED, StopReason.TURN_LIMIT}


@pytest.mark.parametrize("env", ["GuessNumber-v0", "Arithmetic-v0"])
def test_it_passes_the_suite_of_environments(env: str) -> None:
    with EnvDoor(env, port=0) as server:
        check_environment("OpenEnv-v0", url=server.url)


def test_limits_of_tokens_weights_and_the_system_prompt_are_the_client_s() -> None:
    here = {"max_tokens": 12, "max_context": 180, "reward_weights": {"found": 3.0}, "system_prompt": "Be brief."}
    episodes = both("GuessNumber-v0", Says(GUESSES, cut=5), args={"max_turns": 6}, here=here)
    assert {e.stop_reason for e in episodes} >= {StopReason.TOKEN_LIMIT}
    assert {e.stop_reason for e in both("GuessNumber-v0", Says(GUESSES), here={"max_context": 130})} == {
        StopReason.TOKEN_LIMIT
    }
    assert {e.stop_reason for e in both("GuessNumber-v0", Says(["5"]), here={"max_turns": 2})} >= {
        StopReason.TURN_LIMIT
    }


def test_weights_of_the_server_hold_where_the_client_gives_none() -> None:
    with EnvDoor("GuessNumber-v0", env_args={"reward_weights": {"format": 7.0}}, port=0) as server:
        env = gym.make("llm_gym/OpenEnv-v0", url=server.url)
        env.reset(seed=1)
        assert env.step(env.unwrapped.chat.encode_reply("what?"))[1] == pytest.approx(-0.7)
        env.close()


def length(text: str, row: Any) -> float:
    return len(text) / 7


async def judged(text: str, row: Any) -> float:
    await asyncio.sleep(0)
    if "no idea" in text:
        raise BadReply("not even a guess")
    return 1.0


def test_data_sets_rows_rewards_and_bad_replies(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(3)))
    episodes = both("Dataset-v0", Says(["1", "2", "Answer: 3"]), args={"dataset": str(file)}, rows=True)
    assert {e.reward for e in episodes} == {0.0, 1.0}
    rewards = {"dataset": str(file), "reward": {"length": length, "judged": judged}}
    ends = {e.stop_reason: e.error for e in both("Dataset-v0", Says(GUESSES), args=rewards)}
    assert ends == {StopReason.ANSWERED: None, StopReason.BAD_REPLY: "BadReply: not even a guess"}
    assert both("GSM8K-v0", Says(["#### 5", "18"]), args={"dataset": "sample"}, rows=True)
    with EnvDoor("Dataset-v0", env_args={"dataset": str(file)}, port=0) as server:
        env = gym.make("llm_gym/OpenEnv-v0", url=server.url)
        assert env.unwrapped.num_tasks == 3
        with pytest.raises(SettingError, match=r"options\['task'\]: got 3, want a row from 0 to 2."):
            env.reset(options={"task": 3})
        env.close()


class Desk(ToolEnv):
    """Tools, one of them async, one that breaks; a final answer."""

    reward_names = ("right",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([self.double, self.half, self.burn], **kwargs)

    async def double(self, number: int) -> int:
        """Twice a number."""
        await asyncio.sleep(0)
        return 2 * number

    async def half(self, number: float) -> float:
        """Half of a number."""
        return number / 2

    async def burn(self) -> None:
        """Breaks."""
        raise ToolFailure("the desk is on fire")

    def open(self) -> Any:
        self.number = int(self.np_random.integers(9))
        return [{"role": "user", "content": f"Double {self.number}."}]

    def final(self, text: str) -> Reply:
        return Reply(reward={"right": float(str(2 * self.number) in text)}, done=True)


@pytest.mark.parametrize(
    ("format_", "template"), [(None, None), ("pythonic", None), (None, "plain"), ("qwen_xml", "chatml")]
)
def test_tools_are_called_in_the_client_s_own_format(format_: str | None, template: str | None) -> None:
    here = {"tool_format": format_, "chat_template": template}
    with Desk(**here) as desk:
        calls = [desk.call_text("double", number=3), desk.call_text("half", number="x"), desk.call_text("burn")]
    policy = Says([*calls, calls[0] + calls[0], "<tool_call>{broken", "It is 8."])
    episodes = both(Desk, policy, here=here)
    assert {e.stop_reason for e in episodes} >= {StopReason.ANSWERED, StopReason.TOOL_FAILURE}
    assert any(e.rewards["tool_calls"] for e in episodes)
    assert any(e.rewards["format"] < 0 for e in episodes)


def test_a_python_interpreter_over_the_wire() -> None:
    with gym.make("llm_gym/PythonTool-v0") as env:
        call = env.unwrapped.call_text("python", code="n = 6 * 7\nprint(n)")
    policy = Says([call, "Answer: 42", call])
    episodes = both("PythonTool-v0", policy, seeds=4, max_concurrent=4)
    assert any(m["role"] == "tool" and m["content"] == "42" for e in episodes for m in e.messages)


class Rewrites(TextEnv):
    """Forgets all but the last reply."""

    def open(self) -> Any:
        self.turn = int(self.np_random.integers(2))
        return [{"role": "user", "content": "Go on."}]

    def reply(self, text: str) -> Reply:
        self.turn += 1
        chat = [{"role": "user", "content": f"You said: {text}"}]
        return Reply(reward=0.1, rewrite=chat, done=self.turn == 3, messages=[{"role": "user", "content": "Well?"}])


class Waits(TextEnv):
    """Blocks its thread, raises now and then, and counts who is open."""

    metadata: ClassVar[dict[str, Any]] = {**TextEnv.metadata, "blocking": True}
    alive: ClassVar[int] = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        Waits.alive += 1
        self.closed = False

    def open(self) -> Any:
        return [{"role": "user", "content": f"{self.np_random.integers(99)}?"}]

    def reply(self, text: str) -> Reply:
        time.sleep(0.001)
        if text == "50":
            raise RuntimeError("it broke")
        return Reply(done=text == "75")

    def close(self) -> None:
        Waits.alive -= not self.closed
        self.closed = True


class Halved(gym.RewardWrapper):
    def reward(self, reward: Any) -> Any:
        return reward / 2


def test_rewritten_history() -> None:
    assert len(both(Rewrites, Says(GUESSES))[0].trajectories) > 1


def test_wrappers_of_the_server_have_their_say() -> None:
    def halved() -> Any:
        return Halved(gym.make("llm_gym/GuessNumber-v0"))

    with Driver(halved, Says(GUESSES)) as driver, EnvDoor(halved, port=0) as server:
        here = driver.run(range(8))
        with Driver("OpenEnv-v0", Says(GUESSES), env_args={"url": server.url}) as wired:
            there = wired.run(range(8))
    assert [e.reward for e in here] == [e.reward for e in there]


def test_an_error_there_ends_the_episode_here_and_environments_are_closed() -> None:
    with EnvDoor(Waits, port=0) as server:
        with Driver("OpenEnv-v0", Says(["50", "75", "1"]), env_args={"url": server.url}, max_concurrent=8) as driver:
            episodes = driver.run(range(16))
        ends = {e.stop_reason: e.error for e in episodes}
        assert ends == {
            StopReason.ANSWERED: None,
            StopReason.ENV_ERROR: "LLMGymError: RuntimeError: it broke",
        }
        eventually(lambda: server.sessions == 0)
    eventually(lambda: Waits.alive == 0)


def test_the_sessions_of_a_killed_client_end() -> None:
    client = (
        "import sys, llm_gym, gymnasium as gym\n"
        "every = [gym.make('llm_gym/OpenEnv-v0', url=sys.argv[1]) for _ in range(5)]\n"
        "for env in every: env.reset(seed=1)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with EnvDoor(Waits, port=0) as server:
        command = [sys.executable, "-c", client, server.url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert server.sessions == 5
            process.kill()
        eventually(lambda: server.sessions == 0)
        eventually(lambda: Waits.alive == 0)


def test_a_lost_connection_is_an_episode_s_end_and_the_next_reset_makes_another() -> None:
    server = EnvDoor("GuessNumber-v0", port=0)
    env = gym.make("llm_gym/OpenEnv-v0", url=server.url)
    action = env.unwrapped.chat.encode_reply("0")
    first = env.reset(seed=1)[1]
    server.close()
    with pytest.raises(llm_gym.errors.LLMGymError, match=r"http://.* (has ended the connection, or is gone|cannot be)"):
        env.step(action)
    with pytest.raises(llm_gym.errors.LLMGymError, match="cannot be reached"):
        env.reset(seed=1)
    with EnvDoor("GuessNumber-v0", port=server.port):
        assert env.reset(seed=1)[1] == first
        assert env.step(action)[4]["messages"][-1]["content"] == "higher"
    with EnvDoor("GuessNumber-v0", port=server.port):
        assert env.reset(seed=1)[1] == first  # though the last connection ended after the last answer
    env.close()


class Held(TextEnv):
    """Answers once it is let."""

    let: ClassVar[asyncio.Event]
    asked: ClassVar[asyncio.Event]

    def open(self) -> Any:
        return [{"role": "user", "content": f"{self.draw_task(1000)}?"}]

    async def reply(self, text: str) -> Reply:
        Held.asked.set()
        await Held.let.wait()
        return Reply(reward=1.0, done=True)


def test_an_answer_that_nobody_waits_for_any_more_is_not_taken_for_another() -> None:
    async def play(env: Any) -> None:
        _, info = await reset_async(env, seed=1)
        step = asyncio.create_task(step_async(env, env.unwrapped.chat.encode_reply("x")))
        await asyncio.to_thread(eventually, lambda: Held.asked.is_set())
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert (await reset_async(env, seed=1))[1] == info
        Held.let.set()

    Held.let, Held.asked = asyncio.Event(), asyncio.Event()
    with EnvDoor(Held, port=0) as server:
        with gym.make("llm_gym/OpenEnv-v0", url=server.url) as env:
            asyncio.run(play(env))
        eventually(lambda: server.sessions == 0)


def test_idle_sessions_end() -> None:
    with EnvDoor("GuessNumber-v0", port=0, idle=0.05) as server:
        env = gym.make("llm_gym/OpenEnv-v0", url=server.url)
        env.reset(seed=1)
        eventually(lambda: server.sessions == 0)
        with pytest.raises(llm_gym.errors.LLMGymError, match="no such session, or it has ended"):
            env.step(env.unwrapped.chat.encode_reply("0"))
        env.reset(seed=1)
        env.close()


# By hand


async def talk(url: str, *texts: Any) -> list[Any]:
    """The answers to messages, one after the other, on one WebSocket."""
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}/ws") as line:
        found = []
        for text in texts:
            await line.send_str(text if isinstance(text, str) else json.dumps(text))
            found.append(await line.receive_json(timeout=PATIENCE))
        return found


def test_what_is_wrong_with_a_message_is_said_and_the_connection_goes_on() -> None:
    step = {"type": "step", "data": {"text": "Answer: 1"}}
    with EnvDoor("Arithmetic-v0", port=0) as server:
        found = asyncio.run(
            talk(
                server.url,
                "{no json",
                {"type": "jump"},
                step,
                {"type": "reset", "data": {"seed": "7"}},
                {"type": "state"},
                {"type": "reset", "data": {"seed": 7, "episode_id": "mine", "unknown": 1}},
                {"type": "step", "data": {"txt": "1"}},
                {"type": "step", "data": {}},
                step,
                step,
                {"type": "state"},
                [{"type": "reset", "session": "a"}, {"type": "state", "session": "a"}],
            )
        )
    errors = [each["data"].get("code") for each in found[:5]]
    assert errors == ["INVALID_JSON", "UNKNOWN_TYPE", "SESSION_ERROR", "VALIDATION_ERROR", None]
    assert found[3]["data"]["message"] == "reset: seed is '7', want a whole number of at least 0."
    assert found[5]["data"]["observation"]["messages"][0]["role"] == "user"
    assert "did you mean 'text'" in found[6]["data"]["message"]
    assert "got no text" in found[7]["data"]["message"]
    assert found[8]["data"]["done"] is True
    end = {"rewards": {"correct": 0.0}, "truncated": False, "stop_reason": "answered"}
    assert found[8]["data"]["metadata"] == end
    assert found[8]["data"]["observation"].items() >= end.items()
    assert found[9]["data"]["message"] == "step: the episode is over (answered); send a reset first."
    assert found[10] == {"type": "state", "data": {"episode_id": "mine", "step_count": 1}}
    assert [each["session"] for each in found[11]] == ["a", "a"]


async def http(url: str, *requests: tuple[str, str, Any], headers: Any = None) -> list[tuple[int, Any]]:
    async with aiohttp.ClientSession(headers=headers) as session:
        found = []
        for method, path, body in requests:
            async with session.request(method, url + path, json=body) as answer:
                found.append((answer.status, await answer.json()))
        return found


def test_a_look_by_hand_over_http() -> None:
    guess = {"action": {"text": "50"}}
    with EnvDoor("GuessNumber-v0", port=0) as server:
        found = asyncio.run(
            http(
                server.url,
                ("GET", "/health", None),
                ("GET", "/schema", None),
                ("GET", "/metadata", None),
                ("POST", "/reset", {"seed": 7}),
                ("POST", "/step", guess),
                ("POST", "/reset", {"seed": 7, "episode_id": "a"}),
                ("POST", "/step", {**guess, "episode_id": "a"}),
                ("POST", "/step", {"action": {"text": 5}, "episode_id": "a"}),
                ("POST", "/step", [1]),
            )
        )
        assert server.sessions == 1
        assert asyncio.run(http(server.url, ("GET", "/schema", None), headers={"Origin": "http://a.page"}))[0][0] == 403
    assert found[0] == (200, {"status": "healthy"})
    assert found[1][1]["action"]["required"] == ["text"]
    assert found[2][1]["name"] == "llm_gym/GuessNumber-v0"
    assert found[3][1]["observation"]["messages"] == found[5][1]["observation"]["messages"]
    assert [status for status, _ in found] == [200, 200, 200, 200, 422, 200, 200, 422, 422]
    assert found[6][1]["observation"]["messages"][0]["content"] in ("higher", "lower")


# What cannot be


@contextmanager
def silent() -> Iterator[int]:
    """A port at which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def refusal(url: str, **args: Any) -> str:
    with pytest.raises(ConfigError) as error:
        gym.make("llm_gym/OpenEnv-v0", url=url, **args)
    assert re.fullmatch(r"[^\n]+\.", str(error.value))
    return str(error.value)


def test_settings_that_cannot_work_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_GYM_TOKEN", raising=False)
    with silent() as port:
        assert f"url: no server of OpenEnv answers at 'http://127.0.0.1:{port}'" in refusal(f"http://127.0.0.1:{port}")
    assert "want a URL such as" in refusal("127.0.0.1:8100")
    with EnvDoor("GuessNumber-v0", port=0, token="s3cret", max_sessions=1) as server:
        assert "asks for another token" in refusal(server.url)
        assert "asks for another token" in refusal(server.url, token="guess")
        monkeypatch.setenv("LLM_GYM_TOKEN", "s3cret")
        with (
            gym.make("llm_gym/OpenEnv-v0", url=server.url) as env,
            gym.make("llm_gym/OpenEnv-v0", url=server.url) as late,
        ):
            env.reset(seed=1)
            with pytest.raises(llm_gym.errors.LLMGymError, match="The server is full: 1 of 1 sessions are open"):
                late.reset(seed=1)
            assert "is full" in refusal(server.url, token="s3cret")
        assert "action: got 'text', but llm_gym/GuessNumber-v0 there is played by text" in refusal(
            server.url, action="text"
        )
        with pytest.raises(SettingError, match=f"--port: cannot use {server.port}: "):
            EnvDoor("GuessNumber-v0", port=server.port)
    with pytest.raises(SettingError, match=r"want a TextEnv"):
        EnvDoor(lambda: gym.make("CartPole-v1"), port=0)
