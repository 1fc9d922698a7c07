"""Rewards and tools of a user's: none of them stops another episode, and each may be `async def`."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

import llm_gym
from llm_gym import Reply, StopReason
from llm_gym.core import Episode
from llm_gym.envs.dataset import Dataset
from llm_gym.envs.tools import ToolEnv
from llm_gym.envs.tools.questions import QuestionEnv
from llm_gym.envs.tools.schema import Tool
from llm_gym.errors import BadReply, ConfigError, ToolError, ToolFailure
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import Driver, rollout, rollout_async

CHAT = llm_gym.load_chat()


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}.", "want": str(n)}) + "\n" for n in range(9)))
    return str(path)


def score(data: str, reward: Any, *, rows: Any = range(8), on_episode: Any = None, **options: Any) -> list[Episode]:
    """One episode of each row; the reply is 1."""
    args = {"dataset": data, "reward": reward}
    with Driver("Dataset-v0", ScriptedPolicy(["1"], CHAT), env_args=args, **options) as driver:
        return driver.run(range(len(rows)), rows=list(rows), on_episode=on_episode)


def later(seconds: float) -> Any:
    """Puts the running loop's clock forward, until what is returned is called."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]

    def back() -> None:
        loop.time = now  # type: ignore[method-assign]

    return back


everyone = threading.Barrier(8, timeout=60)


def meets(text: str, row: Any) -> float:
    """Returns when eight are in it."""
    everyone.wait()
    return float(row["want"] in text)


class Together:
    """An async reward that returns when `size` calls wait in it, in one loop."""

    def __init__(self, size: int) -> None:
        self.size, self.inside, self.threads, self.loops = size, 0, set[int](), set[Any]()
        self.all = asyncio.Event()

    async def __call__(self, text: str, row: Any) -> float:
        self.inside += 1
        self.threads.add(threading.active_count())
        self.loops.add(asyncio.get_running_loop())
        if self.inside == self.size:
            self.all.set()
        await self.all.wait()
        return float(row["want"] in text)


class TestRewards:
    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("reward", [meets, f"{__name__}:meets"], ids=["object", "import path"])
    def test_a_plain_one_stops_no_other_episode(self, data: str, reward: Any) -> None:
        assert {e.stop_reason for e in score(data, reward)} == {StopReason.ANSWERED}

    @pytest.mark.timeout(120)
    def test_async_ones_wait_together_and_take_no_thread(self, data: str) -> None:
        reward, before = Together(64), threading.active_count()
        episodes = score(data, reward, rows=[1, 2] * 32)
        assert reward.threads == {before}
        assert {e.reward for e in episodes} == {0.0, 1.0}

    @pytest.mark.timeout(120)
    def test_several_of_one_episode_wait_together(self, data: str) -> None:
        judge = Together(2)
        (episode,) = score(data, {"one": judge, "two": judge}, rows=[3])
        assert episode.rewards.keys() == {"one", "two"}
        assert episode.stop_reason is StopReason.ANSWERED

    def test_the_reward_is_that_of_step(self, data: str) -> None:
        async def judged(text: str, row: Any) -> dict[str, float]:
            await asyncio.sleep(0)
            return {"right": float(row["want"] in text), "length": len(text)}

        def plainly(text: str, row: Any) -> dict[str, float]:
            return {"right": float(row["want"] in text), "length": len(text)}

        for reward in (judged, plainly, [plainly]):
            env = Dataset(dataset=data, reward=reward, reward_weights={"length": 0.25})
            for episode in score(data, reward):
                env.reset(options={"task": episode.task})
                assert env.step(CHAT.encode_reply("1"))[-1]["rewards"] == episode.rewards
            env.close()

    @pytest.mark.timeout(120)
    def test_a_plain_one_beside_async_ones_keeps_a_thread_and_that_is_said_once(
        self, data: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        where = set()

        def brief(text: str, row: Any) -> float:
            where.add(threading.get_ident())
            return 1.0

        async def scenario() -> list[Episode]:
            judge = Together(8)
            args = {"dataset": data, "reward": [brief, judge_of(judge)]}
            found = await rollout_async("Dataset-v0", ScriptedPolicy(["1"], CHAT), seeds=range(8), env_args=args)
            assert judge.loops == {asyncio.get_running_loop()}
            return found

        def judge_of(together: Together) -> Any:
            async def judge(text: str, row: Any) -> float:
                return await together(text, row)

            return judge

        for _ in range(2):
            assert {e.rewards["brief"] for e in asyncio.run(scenario())} == {1.0}
        assert threading.get_ident() not in where
        told = [r.getMessage() for r in caplog.records]
        assert told == ["llm_gym/Dataset-v0: every episode keeps a thread, because brief is no `async def`."]

    def test_step_calls_it_where_it_is_called(self, data: str) -> None:
        where = []

        def here(text: str, row: Any) -> float:
            where.append(threading.get_ident())
            return 0.0

        env = Dataset(dataset=data, reward=here)
        env.reset(seed=1)
        env.step(CHAT.encode_reply("1"))
        assert where == [threading.get_ident()]

    @pytest.mark.parametrize("kind", ["plain", "async"])
    @pytest.mark.parametrize(
        ("error", "reason", "words"),
        [
            (KeyError("x"), StopReason.REWARD_ERROR, "reward function 'fails' raised KeyError: 'x' at seed 1, task 1"),
            (SystemExit(2), StopReason.REWARD_ERROR, "raised SystemExit: 2"),
            (StopIteration(), StopReason.REWARD_ERROR, "raised "),
            (BadReply("no JSON"), StopReason.BAD_REPLY, "no JSON"),
        ],
    )
    def test_what_it_raises_ends_its_episode_and_nothing_else(
        self, data: str, kind: str, error: BaseException, reason: StopReason, words: str
    ) -> None:
        def fails(text: str, row: Any) -> float:
            if row["want"] == "1":
                raise error
            return 1.0

        async def fails_later(text: str, row: Any) -> float:
            await asyncio.sleep(0)
            return fails(text, row)

        fails_later.__name__ = "fails"
        ended = score(data, fails if kind == "plain" else fails_later, rows=[0, 1, 2])
        assert [e.stop_reason for e in ended] == [StopReason.ANSWERED, reason, StopReason.ANSWERED]
        assert words in str(ended[1].error)

    @pytest.mark.timeout(120)
    def test_one_that_hangs_ends_by_the_time_limit_alone(self, data: str) -> None:
        """The clock is put forward when the others have ended."""
        release, ended, back = threading.Event(), [], []

        def hangs(text: str, row: Any) -> float:
            assert row["want"] != "1" or release.wait(60)
            return 1.0

        def note(episode: Episode) -> None:
            ended.append(episode.stop_reason)
            if len(ended) == 2:
                back.append(later(3600))
            if len(ended) == 3:
                back.pop()()
                release.set()

        score(data, hangs, rows=[0, 1, 2], on_episode=note, time_limit=600)
        assert ended == [StopReason.ANSWERED, StopReason.ANSWERED, StopReason.TIME_LIMIT]

    def test_what_works_in_the_main_thread_alone_is_found_before_a_run(self, data: str) -> None:
        def alarmed(text: str, row: Any) -> float:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            return 1.0

        with pytest.raises(ConfigError, match="it fails on every reply .*signal only works in main thread"):
            Dataset(dataset=data, reward=alarmed).rehearse()

    def test_async_ones_are_rehearsed(self, data: str) -> None:
        async def fails(text: str, row: Any) -> float:
            raise KeyError(text)

        tried = Together(1)
        Dataset(dataset=data, reward=tried).rehearse()
        assert tried.inside == 1
        with pytest.raises(ConfigError, match="reward function 'fails' raised KeyError"):
            Dataset(dataset=data, reward=fails).rehearse()

    def test_a_subclass_with_a_reply_of_its_own_is_asked_for_it(self, data: str) -> None:
        class Twice(Dataset):
            def reply(self, text: str) -> Reply:
                return Reply(reward={"reward": 2.0}, done=True)

        args = {"dataset": data, "reward": meets}
        episodes = rollout(Twice, ScriptedPolicy(["1"], CHAT), seeds=range(3), env_args=args)
        assert {e.reward for e in episodes} == {2.0}

    def test_grading_of_our_own_is_not_awaited(self, data: str) -> None:
        assert not Dataset(dataset=data, answer="want", reward="number").asynchronous
        assert not Dataset(dataset=data, answer="want", reward="number").metadata["blocking"]


class Tools(ToolEnv):
    """Over with the first reply that calls no tool."""

    def open(self) -> Any:
        return [{"role": "user", "content": "Call it."}]

    def final(self, text: str) -> Any:
        return Reply(reward=1.0, done=True)


def call(env: ToolEnv, name: str, **arguments: Any) -> str:
    """What the model is told, by `step`."""
    env.reset(seed=1)
    *_, info = env.step(CHAT.encode_reply(env.call_text(name, **arguments)))
    return str(info["messages"][-1]["content"])


def told(env: Any, name: str, **arguments: Any) -> tuple[str, StopReason]:
    """The same, in a rollout."""
    (episode,) = rollout(env, ScriptedPolicy([env().call_text(name, **arguments), "Done."], CHAT), seeds=[1])
    return next(str(m["content"]) for m in episode.messages if m["role"] == "tool"), episode.stop_reason


class TestTools:
    @pytest.mark.timeout(120)
    def test_async_ones_wait_together_and_take_no_thread(self) -> None:
        both, before = Together(50), threading.active_count()

        async def search(query: str) -> str:
            "Looks it up."
            await both(query, {"want": query})
            return query

        def env() -> ToolEnv:
            return Tools([search])

        policy = ScriptedPolicy(
            lambda c: CHAT.encode_reply("Done." if asked(c) else env().call_text("search", query="x"))
        )
        episodes = rollout(env, policy, seeds=range(50))
        assert both.threads == {before}
        assert {(e.stop_reason, e.rewards["tool_calls"]) for e in episodes} == {(StopReason.ANSWERED, 1.0)}

    @pytest.mark.parametrize(
        ("error", "words", "end"),
        [
            (ValueError("bad"), "Error: ValueError: bad", StopReason.ANSWERED),
            (SystemExit(1), "Error: SystemExit: 1", StopReason.ANSWERED),
            (ToolError("no such city"), "Error: no such city", StopReason.ANSWERED),
            (TimeoutError("far"), "Error: TimeoutError: far", StopReason.ANSWERED),
            (ToolFailure("down"), "Error: down", StopReason.TOOL_FAILURE),
        ],
    )
    def test_what_they_raise_is_told_as_of_plain_ones(self, error: BaseException, words: str, end: StopReason) -> None:
        async def lookup() -> str:
            "Looks it up."
            await asyncio.sleep(0)
            raise error

        def plainly() -> str:
            "Looks it up."
            raise error

        for env in (lambda: Tools([lookup]), lambda: Tools([Tool({"function": {"name": "lookup"}}, plainly)])):
            assert call(env(), "lookup") == words
            assert told(env, "lookup") == (words, end)

    @pytest.mark.timeout(120)
    def test_one_that_takes_too_long_is_cancelled_and_the_model_told(self) -> None:
        cancelled = []

        async def forever() -> str:
            "Never answers."
            back = later(3600)
            try:
                await asyncio.Event().wait()
            finally:
                back()
                cancelled.append(1)
            raise AssertionError

        words = "Error: forever gave no result within 30 seconds."
        assert call(Tools([forever]), "forever") == words
        assert told(lambda: Tools([forever]), "forever") == (words, StopReason.ANSWERED)
        assert len(cancelled) == 2

    @pytest.mark.timeout(120)
    def test_beside_plain_ones_all_but_them_runs_in_one_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        """What `open` made is bound to its thread, and the plain tool uses it there."""
        everyone = threading.Barrier(4, timeout=60)

        class Mixed(Tools):
            def __init__(self) -> None:
                super().__init__([self.count, self.search])

            def open(self) -> Any:
                self.books = sqlite3.connect(":memory:")
                return super().open()

            def count(self) -> int:
                "Counts the books."
                everyone.wait()
                return int(self.books.execute("select 7").fetchone()[0])

            async def search(self) -> str:
                "Looks it up."
                await asyncio.sleep(0)
                return "found"

            def final(self, text: str) -> Any:
                return Reply(reward=float(self.books.execute("select 1").fetchone()[0]), done=True)

        both, before = Mixed().call_text("count") + Mixed().call_text("search"), set(threading.enumerate())
        policy = ScriptedPolicy(lambda c: CHAT.encode_reply("Done." if asked(c) else both))
        for episode in rollout(Mixed, policy, seeds=range(4)):
            assert [m["content"] for m in episode.messages if m["role"] == "tool"] == ["7", "found"]
            assert (episode.stop_reason, episode.reward) == (StopReason.ANSWERED, 1.0)
        said = [r.getMessage() for r in caplog.records]
        assert said == ["Mixed: every episode keeps a thread, because count is no `async def`."]
        assert set(threading.enumerate()) <= before

    def test_questions_with_async_tools_are_graded_and_released_off_the_loop(self, tmp_path: Path) -> None:
        """To grade mathematics may wait for a worker."""
        (tmp_path / "qa.jsonl").write_text('{"question": "?", "answer": "x + 1"}\n', encoding="utf-8")
        where = []

        async def look() -> str:
            "Looks it up."
            return "x + 1"

        class Asked(QuestionEnv):
            def final(self, text: str) -> Any:
                where.append(threading.current_thread().name)
                return super().final(text)

            def release(self) -> None:
                where.append(threading.current_thread().name)

        def env() -> Asked:
            return Asked([look], dataset=str(tmp_path / "qa.jsonl"))

        (episode,) = rollout(env, ScriptedPolicy(["It is \\boxed{1 + x}."], CHAT), seeds=[1])
        assert (episode.stop_reason, episode.reward) == (StopReason.ANSWERED, 1.0)
        assert set(where) == {"llm_gym-tool"}

    def test_they_conform(self) -> None:
        async def double(number: int) -> int:
            "Twice a number."
            await asyncio.sleep(0)
            return 2 * number

        class Doubles(Tools):
            def open(self) -> Any:
                self.number = int(self.np_random.integers(100))
                return [{"role": "user", "content": f"What is twice {self.number}?"}]

            async def final(self, text: str) -> Any:
                return Reply(reward=float(str(2 * self.number) in text), done=True)

        llm_gym.check_environment(lambda: Doubles([double]))


def asked(context: Any) -> bool:
    """Whether a result was shown."""
    return "tool_response" in CHAT.tokenizer.decode(context)
