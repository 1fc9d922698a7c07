"""Agents that play episodes: what they may return, and how those end that go wrong."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import templates

from llm_gym import load_chat
from llm_gym.core import Completion, Episode, Ids, Sampling, StopReason
from llm_gym.errors import BadReply, ConfigError, SettingError
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.data.agents import AgentConfig
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.serving.agent_driver import AgentDriver
from llm_gym.serving.agents import CommandAgent, FunctionAgent

RIGHT = "Answer: 4"


def policy(*replies: str) -> ScriptedPolicy:
    return ScriptedPolicy(replies or (RIGHT,), load_chat())


def row(tmp_path: Path) -> dict[str, Any]:
    """The arguments of an environment with one row."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "What is 2 + 2?", "answer": "4", "hint": "even"}\n', encoding="utf-8")
    return {"dataset": str(path)}


def play(
    agent: Callable[..., Any], env_args: dict[str, Any], engine: Any = None, *, seeds: int = 1, **options: Any
) -> list[Episode]:
    made = (lambda: agent) if isinstance(agent, CommandAgent) else (lambda: FunctionAgent(agent))
    with AgentDriver("Dataset-v0", engine or policy(), agent=made, env_args=env_args, **options) as driver:
        return driver.run(range(seeds))


async def ask(endpoint: Any, text: str = "What is 2 + 2?") -> str:
    async with endpoint.client() as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])
    return str(answer.choices[0].message.content)


def asking(outcome: Any) -> Callable[..., Any]:
    """An agent that asks once; an outcome that is an exception is raised."""

    async def solve(task: Any, endpoint: Any) -> Any:
        await ask(endpoint)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return solve


OUTCOMES = {
    "a number": (0.25, 0.25, {"reward": 0.25}),
    "named ones, weighed": ({"correct": 1.0, "short": 0.5}, 1.0 + 2 * 0.5, {"correct": 1.0, "short": 0.5}),
    "a text to be scored": ("I say: Answer: 4", 1.0, {"correct": 1.0}),
    "a wrong one": ("Answer: 5", 0.0, {"correct": 0.0}),
    "nothing: the last reply": (None, 1.0, {"correct": 1.0}),
}


@pytest.mark.parametrize("what", OUTCOMES)
def test_what_an_agent_returns_is_its_reward(tmp_path: Path, what: str) -> None:
    outcome, reward, parts = OUTCOMES[what]
    (episode,) = play(asking(outcome), row(tmp_path) | {"reward_weights": {"short": 2.0}})
    assert (episode.stop_reason, episode.error) == (StopReason.ANSWERED, None)
    assert (episode.reward, dict(episode.rewards)) == (reward, parts)
    assert [m["content"] for m in episode.messages] == ["What is 2 + 2?", RIGHT]


def test_the_task_is_the_row_and_its_opening_chat(tmp_path: Path) -> None:
    tasks = []

    def solve(task: Any, endpoint: Any) -> float:
        tasks.append(task)
        with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
            client.chat.completions.create(model=endpoint.model, messages=task["messages"])
        return 1.0

    play(solve, row(tmp_path))
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    assert tasks == [{"prompt": "What is 2 + 2?", "answer": "4", "hint": "even", "messages": chat}]


ENDS = {
    # what it raises, how the episode ends, what the error says
    "a fault": (KeyError("answer"), StopReason.ENV_ERROR, "KeyError: 'answer'"),
    "an exit": (SystemExit(3), StopReason.ENV_ERROR, "SystemExit: 3"),
    "a bad reply": (BadReply("no JSON"), StopReason.BAD_REPLY, "BadReply: no JSON"),
    "no number": (float("nan"), StopReason.REWARD_ERROR, "want a finite number"),
    "a sum beyond every number": ({"a": 1e308, "b": 1e308}, StopReason.REWARD_ERROR, "want a finite number"),
    "a name that is no text": ({1: 1.0}, StopReason.REWARD_ERROR, "want a text"),
    "a cancellation of its own": (asyncio.CancelledError(), StopReason.ENV_ERROR, "not by its driver"),
}


@pytest.mark.parametrize("what", ENDS)
@pytest.mark.parametrize("form", ["async", "plain"])
def test_an_agent_that_goes_wrong_is_data(tmp_path: Path, what: str, form: str) -> None:
    outcome, stop, words = ENDS[what]
    solve = asking(outcome)
    agent = solve if form == "async" else (lambda task, endpoint: asyncio.run(solve(task, endpoint)))
    (episode,) = play(agent, row(tmp_path))
    assert (episode.stop_reason, episode.reward) == (stop, 0.0)
    assert words in str(episode.error)
    assert episode.tokens_generated > 0  # what was sampled is not lost


@pytest.mark.parametrize("form", ["async", "plain"])
def test_an_agent_names_its_arguments_as_it_likes(tmp_path: Path, form: str) -> None:
    async def solve(row: Any, where: Any) -> float:
        await ask(where, row["prompt"])
        return 1.0

    def plain(row: Any, where: Any) -> float:
        return asyncio.run(solve(row, where))

    (episode,) = play(solve if form == "async" else plain, row(tmp_path))
    assert (episode.stop_reason, episode.reward) == (StopReason.ANSWERED, 1.0)


def test_an_agent_that_asks_nothing_fails_its_episode(tmp_path: Path) -> None:
    (episode,) = play(lambda task, endpoint: 1.0, row(tmp_path))
    assert (episode.stop_reason, episode.turns) == (StopReason.ENV_ERROR, ())
    assert "without asking" in str(episode.error)


LIMITS = {
    "turns": ({"max_turns": 2}, StopReason.TURN_LIMIT, 2),
    "context": ({"max_context": 60}, StopReason.TOKEN_LIMIT, None),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_limit_that_an_agent_runs_into_earns_nothing_and_is_trained(tmp_path: Path, what: str) -> None:
    limits, stop, turns = LIMITS[what]

    async def solve(task: Any, endpoint: Any) -> float:
        for count in range(1, 9):
            await ask(endpoint, "again " * 4 * count)
        return 1.0

    (episode,) = play(solve, row(tmp_path) | limits)
    assert (episode.stop_reason, episode.reward) == (stop, 0.0)
    assert not episode.stop_reason.failed
    assert len(episode.turns) == (turns or len(episode.turns)) > 0


@pytest.mark.parametrize("form", ["async", "plain", "deaf", "command"])
def test_an_agent_that_hangs_ends_with_the_time_limit(tmp_path: Path, form: str) -> None:
    over = threading.Event()

    async def hang(task: Any, endpoint: Any) -> None:
        await ask(endpoint)
        await asyncio.sleep(1e6)

    async def deaf(task: Any, endpoint: Any) -> None:
        while not over.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    forms = {
        "async": hang,
        "plain": lambda task, endpoint: over.wait(),
        "deaf": deaf,
        "command": CommandAgent("sleep 1000"),
    }
    try:
        (episode,) = play(forms[form], row(tmp_path), time_limit=2.0)
    finally:
        over.set()
    assert episode.stop_reason == StopReason.TIME_LIMIT
    assert episode.tokens_generated > 0 or form != "async"
    assert not [p for p in psutil.Process().children(recursive=True) if "sleep" in p.cmdline()]


class Slow:
    """A policy whose second and later answers never come."""

    def __init__(self) -> None:
        self.asked, self.given_up = 0, 0

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        self.asked += 1
        if self.asked > 1:
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                self.given_up += 1
                raise
        return await policy().complete(context, sampling)


def test_a_request_that_an_agent_leaves_behind_ends_with_its_episode(tmp_path: Path) -> None:
    engine = Slow()
    left = []

    async def solve(task: Any, endpoint: Any) -> float:
        await ask(endpoint)
        left.append(asyncio.ensure_future(ask(endpoint)))
        while engine.asked < 2:
            await asyncio.sleep(0.01)
        return 1.0

    (episode,) = play(solve, row(tmp_path), engine)
    assert (episode.stop_reason, len(episode.turns)) == (StopReason.ANSWERED, 1)
    assert engine.given_up == 1


SCRIPT = """
import json, os, sys, urllib.request
task = json.load(sys.stdin)
body = json.dumps({"model": "m", "messages": task["messages"]}).encode()
head = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, head)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
"""


def command(tmp_path: Path, text: str) -> CommandAgent:
    (tmp_path / "agent.py").write_text(text, encoding="utf-8")
    return CommandAgent(f"{sys.executable} {tmp_path / 'agent.py'}")


def test_a_command_is_scored_on_its_output(tmp_path: Path) -> None:
    (episode,) = play(command(tmp_path, SCRIPT), row(tmp_path))
    assert (episode.stop_reason, episode.reward, episode.error) == (StopReason.ANSWERED, 1.0, None)
    assert len(episode.turns) == 1


def test_a_command_reaches_the_endpoint_whatever_proxy_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (episode,) = play(command(tmp_path, SCRIPT), row(tmp_path))
    assert (episode.stop_reason, episode.error) == (StopReason.ANSWERED, None)


def test_a_command_that_fails_says_what_it_wrote_last(tmp_path: Path) -> None:
    (episode,) = play(command(tmp_path, SCRIPT + "sys.exit('no luck')"), row(tmp_path))
    assert episode.stop_reason == StopReason.ENV_ERROR
    assert "exit status 1: no luck" in str(episode.error)


def test_what_a_command_leaves_behind_is_killed(tmp_path: Path) -> None:
    leak = (
        f"import subprocess; open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))\n"
    )
    (episode,) = play(command(tmp_path, leak + SCRIPT), row(tmp_path))
    assert episode.reward == 1.0
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid: int) -> bool:
    """Whether a process that was killed comes to its end: not at once, and it stays where nobody waits for it."""
    for _ in range(600):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return True
    return False


def test_a_command_may_write_much_and_read_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 + 2?", "answer": "4", "notes": "%s"}\n' % ("x" * 3_000_000), encoding="utf-8")
    chatty = SCRIPT.replace("json.load(sys.stdin)", '{"messages": [{"role": "user", "content": "2 + 2?"}]}')
    loud = "import sys; sys.stderr.write('e' * 3_000_000)\n" + chatty + "print('y' * 3_000_000)"
    (episode,) = play(command(tmp_path, loud), {"dataset": str(rows)})
    assert (episode.stop_reason, episode.error) == (StopReason.ANSWERED, None)


def test_a_policy_that_cannot_work_stops_the_run(tmp_path: Path) -> None:
    class Refusing:
        async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
            raise SettingError("policy: no.")

    async def careless(task: Any, endpoint: Any) -> float:
        with suppress(openai.APIError):
            await ask(endpoint)
        return 1.0

    with pytest.raises(SettingError, match=r"policy: no\."):
        play(careless, row(tmp_path), Refusing())


def test_a_policy_that_fails_once_fails_that_episode_alone(tmp_path: Path) -> None:
    class Once:
        calls = 0

        async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
            Once.calls += 1
            if Once.calls == 1:
                raise RuntimeError("lost")
            return await policy().complete(context, sampling)

    episodes = play(asking(1.0), row(tmp_path), Once(), seeds=3)
    assert sorted(e.stop_reason for e in episodes) == ["answered", "answered", "policy_error"]


def test_nothing_is_left_when_a_driver_closes(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        play(asking(1.0), row(tmp_path), seeds=4)
    assert {thread.name for thread in threading.enumerate()} <= before
    assert len(os.listdir("/proc/self/fd")) <= files + 3


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"function": "nowhere_at_all:solve"}, "cannot import 'nowhere_at_all'"),
        ({"function": "json:laods"}, "did you mean 'loads'"),
        ({"function": "json"}, "want 'package.module:function'"),
        ({"command": "no-such-program --x"}, "no program is found"),
        ({"command": ""}, "no program is found"),
    ],
)
def test_an_agent_that_is_none_is_found_before_a_model_loads(setting: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AgentConfig(**setting).check()


def test_one_agent_plays_and_not_two() -> None:
    with pytest.raises(ConfigError, match="pass one"):
        load(TrainConfig, None, ["agent.function=a:b", "agent.command=c"])


def test_a_completion_ends_where_a_call_of_its_own_chat_does(tmp_path: Path) -> None:
    """GLM ends calls with another token than answers, and an environment without tools does not know it."""
    glm = templates.tokenizer(templates.source("glm4moe"), "<|endoftext|>")
    tool = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}
    ends: list[set[int]] = []

    class Seeing:
        stop_ids = (3,)

        async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
            ends.append(set(sampling.stop_token_ids or ()))
            return await ScriptedPolicy(["4"], load_chat(glm)).complete(context, sampling)

    async def solve(task: Any, endpoint: Any) -> float:
        async with endpoint.client() as client:
            chat = [{"role": "user", "content": "2 + 2?"}]
            await client.chat.completions.create(model="m", messages=chat)
            await client.chat.completions.create(model="m", messages=chat, tools=[tool])
        return 1.0

    (episode,) = play(solve, row(tmp_path) | {"tokenizer": glm}, Seeing())
    assert episode.error is None
    plain, with_tools = ends
    assert plain == {*load_chat(glm).stop_ids, 3}
    assert with_tools - plain == {glm.convert_tokens_to_ids("<|observation|>")}
