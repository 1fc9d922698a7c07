"""Hooks, tools and rewards that are `async def`: awaited, without a thread, and their faults are data as ever."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from typing import Any, ClassVar

import gymnasium
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import OrderEnforcing

import llm_gym
from llm_gym import Reply, StopReason, TextEnv
from llm_gym.concurrency import finish, is_async
from llm_gym.core import Episode
from llm_gym.envs.asynchronous import reset_async, step_async
from llm_gym.errors import BadReply, SettingError, ToolFailure
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import rollout, rollout_async
from llm_gym.vector import TextVectorEnv

CHAT = llm_gym.load_chat()


def said(*texts: str) -> ScriptedPolicy:
    return ScriptedPolicy(texts or ["yes"], CHAT)


def play(env: Any, policy: Any = None, *, seeds: Any = range(3), **options: Any) -> list[Episode]:
    return rollout(env, policy or said(), seeds=seeds, **options)


class Gate:
    """Opens when `size` callers wait at it, all in one event loop: passed only by those that wait together."""

    def __init__(self, size: int) -> None:
        self.size, self.waiting, self.threads, self.loops = size, 0, set[int](), set[int]()
        self.open: asyncio.Event | None = None

    async def passed(self) -> None:
        self.open = self.open or asyncio.Event()
        self.waiting += 1
        self.threads.add(threading.active_count())
        self.loops.add(id(asyncio.get_running_loop()))
        if self.waiting == self.size:
            self.open.set()
        await self.open.wait()


class Waits(TextEnv):
    """Both hooks are `async def`; every reply waits at the gate."""

    gate: ClassVar[Gate]

    async def open(self) -> Any:
        await asyncio.sleep(0)
        self.word = str(self.np_random.choice(["yes", "no"]))
        return [{"role": "user", "content": f"Say {self.word}."}]

    async def reply(self, text: str) -> Reply:
        await self.gate.passed()
        return Reply(reward={"right": float(self.word in text)}, done=True)


class Drawn(Waits):
    """The same without a gate, two turns."""

    async def open(self) -> Any:
        self.turn = 0
        return await super().open()

    async def reply(self, text: str) -> Reply:
        await asyncio.sleep(0)
        self.turn += 1
        more = [{"role": "user", "content": f"And {self.np_random.integers(9)}?"}]
        return Reply(more, reward={"right": float(self.word in text)}, done=self.turn == 2)


class Plain(Drawn):
    """The same again, with plain hooks."""

    def open(self) -> Any:
        return finish(super().open())

    def reply(self, text: str) -> Any:
        return finish(super().reply(text))


class TestDriver:
    def test_hundreds_wait_at_once_and_no_thread_is_made(self) -> None:
        Waits.gate, before = Gate(500), threading.active_count()
        episodes = play(Waits, seeds=range(500), max_concurrent=500)
        assert Waits.gate.threads == {before}
        assert {e.stop_reason for e in episodes} == {StopReason.ANSWERED}
        assert {e.reward for e in episodes} == {0.0, 1.0}

    def test_they_are_awaited_by_id_too(self) -> None:
        """Around an environment made by id are wrappers of Gymnasium's own."""
        llm_gym.register("test/Waits-v0", Waits)
        try:
            Waits.gate, before = Gate(8), threading.active_count()
            assert len(play("test/Waits-v0", seeds=range(8))) == 8
            assert Waits.gate.threads == {before}
        finally:
            del gymnasium.registry["test/Waits-v0"]

    def test_episodes_are_those_of_plain_hooks(self) -> None:
        awaited, plain = (play(env, said("yes", "no", "what"), seeds=range(6)) for env in (Drawn, Plain))
        for a, b in zip(awaited, plain, strict=True):
            assert [t.prompt.tolist() for t in a.turns] == [t.prompt.tolist() for t in b.turns]
            assert (a.rewards, a.stop_reason, a.messages) == (b.rewards, b.stop_reason, b.messages)

    def test_it_works_where_a_loop_is_running(self) -> None:
        async def notebook() -> list[list[Episode]]:
            return [play(Drawn), await rollout_async(Drawn, said(), seeds=range(3))]

        for episodes in asyncio.run(notebook()):
            assert {e.stop_reason for e in episodes} == {StopReason.ANSWERED}

    def test_a_plain_environment_is_not_awaited(self) -> None:
        """Its way stays as short as it was."""

        class Never(Plain):
            async def step_async(self, action: Any) -> Any:
                raise AssertionError

        assert {e.stop_reason for e in play(Never)} == {StopReason.ANSWERED}


class TestStep:
    """`env.step()` stays what it is in Gymnasium."""

    def episode(self, env: Any) -> list[Any]:
        seen = [env.reset(seed=3)[1]["messages"]]
        while not seen[-1] or not isinstance(seen[-1], tuple) or not seen[-1][1]:
            _, reward, terminated, _, info = env.step(CHAT.encode_reply("yes"))
            seen.append((reward, terminated, info["messages"]))
        return seen

    def test_outside_and_inside_a_loop(self) -> None:
        async def notebook() -> list[Any]:
            return self.episode(Drawn())

        plain = self.episode(Plain())
        assert self.episode(Drawn()) == plain
        assert asyncio.run(notebook()) == plain

    def test_awaited(self) -> None:
        async def script() -> tuple[Any, ...]:
            env = OrderEnforcing(Drawn())
            await reset_async(env, seed=3, options={"task": 1})
            return await step_async(env, CHAT.encode_reply("yes"))

        plain = Plain()
        plain.reset(seed=3, options={"task": 1})
        want, got = plain.step(CHAT.encode_reply("yes")), asyncio.run(script())
        assert got[0].tolist() == want[0].tolist()
        assert got[1:] == want[1:]


class TestFaults:
    """As with hooks that are not awaited (`test_rollout.py`)."""

    def faulty(self, fault: Any) -> Any:
        class Faulty(Drawn):
            async def reply(self, text: str) -> Reply:
                if "0" in str(self.np_random_seed):
                    await fault()
                return await super().reply(text)

        return Faulty

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize(
        ("error", "reason", "words"),
        [
            (RuntimeError("boom"), StopReason.ENV_ERROR, "RuntimeError: boom"),
            (SystemExit(3), StopReason.ENV_ERROR, "SystemExit: 3"),
            (TimeoutError("judge"), StopReason.ENV_ERROR, "TimeoutError: judge"),
            (asyncio.CancelledError(), StopReason.ENV_ERROR, "cancelled"),
            (ToolFailure("gone"), StopReason.TOOL_FAILURE, "gone"),
            (BadReply("no JSON"), StopReason.BAD_REPLY, "BadReply: no JSON"),
        ],
    )
    def test_what_a_hook_raises_ends_its_episode_and_nothing_else(
        self, error: BaseException, reason: StopReason, words: str
    ) -> None:
        async def fault() -> None:
            await asyncio.sleep(0)
            raise error

        ended = {e.seed: e for e in play(self.faulty(fault), seeds=range(5))}
        assert len(ended) == 5
        assert ended[0].stop_reason is reason
        assert words in str(ended[0].error)
        assert {ended[seed].stop_reason for seed in range(1, 5)} == {StopReason.ANSWERED}

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("then", ["nothing", "an answer", "another error"])
    def test_a_hook_cut_by_the_time_limit_ends_its_episode(self, then: str) -> None:
        """Whatever the hook makes of being cancelled; the clock is put forward, so that nobody waits."""
        cancelled = []

        async def fault() -> None:
            loop = asyncio.get_running_loop()
            now = loop.time
            loop.time = lambda: now() + 3600  # type: ignore[method-assign]
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(then)
                if then == "another error":
                    raise RuntimeError("the judge went away") from None
                if then == "nothing":
                    raise
            finally:
                loop.time = now  # type: ignore[method-assign]

        (episode,) = play(self.faulty(fault), seeds=[0], time_limit=600)
        assert cancelled == [then]
        assert episode.stop_reason is StopReason.TIME_LIMIT

    def test_cancelling_a_rollout_cancels_its_hooks(self) -> None:
        inside, cancelled = [], []

        async def fault() -> None:
            inside.append(1)
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(1)

        async def scenario() -> None:
            task = asyncio.ensure_future(rollout_async(self.faulty(fault), said(), seeds=[0, 10, 20]))
            while len(inside) < 3:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(scenario())
        assert len(cancelled) == 3


class Passing(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Changes nothing, and says nothing about awaiting."""


class Halved(Passing):
    def step(self, action: Any) -> Any:
        return self._half(self.env.step(action))

    def _half(self, result: Any) -> Any:
        return result[0], result[1] / 2, *result[2:]


class HalvedAsync(Halved):
    async def step_async(self, action: Any) -> Any:
        return self._half(await step_async(self.env, action))


class NotedAsync(Passing):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self._noted(self.env.reset(seed=seed, options=options))

    async def reset_async(self, *, seed: Any = None, options: Any = None) -> Any:
        return self._noted(await reset_async(self.env, seed=seed, options=options))

    def _noted(self, start: Any) -> Any:
        return start[0], {**start[1], "noted": True}


class Sees(Drawn):
    """Notes which thread its `step` is called in, and which loop its hooks run in."""

    seen: ClassVar[set[tuple[str, int]]] = set()

    def step(self, action: Any) -> Any:
        self.seen.add(("step", threading.get_ident()))
        return super().step(action)

    async def step_async(self, action: Any) -> Any:
        self.seen.add(("step_async", threading.get_ident()))
        return await super().step_async(action)

    async def reply(self, text: str) -> Reply:
        self.seen.add(("reply", id(asyncio.get_running_loop())))
        return await super().reply(text)


class TestWrappers:
    def seen(self, make: Any, seeds: Any = range(4)) -> tuple[list[Episode], dict[str, set[int]]]:
        async def both() -> tuple[list[Episode], int]:
            return await rollout_async(make, said("yes"), seeds=seeds), id(asyncio.get_running_loop())

        Sees.seen.clear()
        episodes, loop = asyncio.run(both())
        by: dict[str, set[int]] = {}
        for name, where in Sees.seen:
            by.setdefault(name, set()).add(where)
        assert by.pop("reply") == {loop}  # wherever a step is called, what is bound to a loop can be shared
        return episodes, by

    def test_one_that_has_step_async_is_awaited(self, caplog: pytest.LogCaptureFixture) -> None:
        episodes, seen = self.seen(lambda: Passing(HalvedAsync(OrderEnforcing(Passing(Sees())))))
        assert seen == {"step_async": {threading.get_ident()}}
        assert {e.reward for e in episodes} <= {0.0, 1.0}
        assert "thread" not in caplog.text

    def test_one_that_has_not_takes_a_thread_and_that_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        def make() -> Any:
            return Halved(Sees())

        episodes, seen = self.seen(make)
        assert seen.keys() == {"step"}
        assert len(seen["step"]) == 4
        assert threading.get_ident() not in seen["step"]
        assert {e.stop_reason for e in episodes} == {StopReason.ANSWERED}
        self.seen(make)
        told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert told == ["Sees: every episode keeps a thread, because Halved has step() without step_async()."]

    def test_episodes_are_the_same_either_way(self) -> None:
        def rewards(make: Any) -> list[tuple[float, Any]]:
            return [(e.reward, e.rewards) for e in play(make, said("yes"), seeds=range(8))]

        assert rewards(lambda: Halved(Drawn())) == rewards(lambda: HalvedAsync(Drawn()))

    def test_a_time_limit_reaches_a_hook_behind_a_thread(self) -> None:
        """And the thread ends, as the hook it waited for was cancelled."""
        cancelled, before = threading.Event(), set(threading.enumerate())

        class Hangs(Drawn):
            async def reply(self, text: str) -> Reply:
                loop = asyncio.get_running_loop()
                now = loop.time
                loop.time = lambda: now() + 3600  # type: ignore[method-assign]
                try:
                    await asyncio.Event().wait()
                finally:
                    loop.time = now  # type: ignore[method-assign]
                    cancelled.set()
                raise AssertionError

        (episode,) = play(lambda: Halved(Hangs()), seeds=[0], time_limit=600)
        assert episode.stop_reason is StopReason.TIME_LIMIT
        assert cancelled.is_set(), "before the rollout ends: its loop may not run again"
        for thread in set(threading.enumerate()) - before:
            if thread.name == "llm_gym-env":
                thread.join(60)
                assert not thread.is_alive()

    def test_plain_environments_need_no_wrapper_that_awaits(self, caplog: pytest.LogCaptureFixture) -> None:
        where = set()

        class Here(Halved):
            def step(self, action: Any) -> Any:
                where.add(threading.get_ident())
                return super().step(action)

        play(lambda: Here(Plain()))
        assert where == {threading.get_ident()}
        assert not caplog.records

    def test_what_cannot_be_awaited_says_why(self) -> None:
        async def script() -> None:
            await step_async(Halved(Drawn()), CHAT.encode_reply("yes"))

        with pytest.raises(
            SettingError, match=r"Drawn cannot be awaited, because Halved has step\(\) without step_async\(\)"
        ):
            asyncio.run(script())

    def test_a_subclass_with_a_step_of_its_own_is_stepped_by_it(self) -> None:
        class Counts(Drawn):
            def step(self, action: Any) -> Any:
                result = super().step(action)
                result[-1]["counted"] = True
                counted.append(1)
                return result

        counted: list[int] = []
        play(Counts)
        assert len(counted) == 6


class TestVector:
    """All environments of a vector environment are awaited in one event loop."""

    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_results_are_those_of_plain_hooks(self, mode: Any) -> None:
        def played(env: Any) -> list[Any]:
            vector = TextVectorEnv(env, 3, autoreset_mode=mode)
            found = [vector.reset(seed=5)]
            over = [False] * 3
            for i in range(6):
                if mode is AutoresetMode.DISABLED and any(over):
                    found.append(vector.reset(seed=i, options={"reset_mask": over}))
                found.append(vector.step([CHAT.encode_reply("yes")] * 3))
                over = found[-1][2]
            vector.close()
            return found

        for a, b in zip(played(Drawn), played(Plain), strict=True):
            assert data_equivalence(a, b, exact=True)

    def test_they_wait_together_and_no_thread_is_made(self) -> None:
        Waits.gate = Gate(50)
        vector = TextVectorEnv(Waits, 50)
        vector.reset(seed=1)
        before = threading.active_count()
        assert vector.step([CHAT.encode_reply("yes")] * 50)[2].all()
        assert Waits.gate.threads == {before}
        vector.close()

    def test_no_one_waits_for_the_slowest(self) -> None:
        Waits.gate = Gate(2)
        vector = TextVectorEnv(Waits, 3)
        vector.reset(seed=1)
        action = CHAT.encode_reply("yes")
        vector.send([action], [0])
        with pytest.raises(TimeoutError, match="No environment finished"):
            vector.recv(timeout=0.01)
        vector.send([action], [2])
        seen: set[int] = set()
        while len(seen) < 2:
            seen |= {result.index for result in vector.recv(timeout=60)}
        assert seen == {0, 2}
        Waits.gate = Gate(2)
        vector.send([action], [1])
        vector.close()  # while a hook waits
        assert not [t for t in threading.enumerate() if t.name == "llm_gym-envs"]

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("error", [SystemExit, RuntimeError, GeneratorExit, asyncio.CancelledError])
    def test_whatever_a_hook_raises_ends_its_step(self, error: type[BaseException]) -> None:
        class Raises(Drawn):
            async def reply(self, text: str) -> Reply:
                await asyncio.sleep(0)
                if text == "boom":
                    raise error
                return await super().reply(text)

        vector = TextVectorEnv(Raises, 2)
        vector.reset(seed=1)
        actions = [CHAT.encode_reply(word) for word in ("boom", "yes")]
        with pytest.raises(error):
            vector.step(actions)
        vector.reset(seed=1)
        vector.send(actions, [0, 1])
        ends: list[Any] = []
        while len(ends) < 2:
            try:
                ends += [result.index for result in vector.recv(timeout=60)]
            except error:
                ends.append("raised")
        assert sorted(map(str, ends)) == ["1", "raised"]
        vector.close()


class TestConformance:
    @pytest.mark.parametrize("env", [Drawn, Plain, lambda: NotedAsync(Drawn())])
    def test_environments_with_async_hooks_conform(self, env: Any) -> None:
        llm_gym.check_environment(env)

    def test_one_that_plays_otherwise_when_awaited_is_found(self) -> None:
        class Otherwise(Drawn):
            async def step_async(self, action: Any) -> Any:
                *rest, info = await super().step_async(action)
                return *rest, {**info, "awaited": True}

        with pytest.raises(AssertionError, match="awaited: seed 0, awaited, the episode differs: step 1, info"):
            llm_gym.check_environment(Otherwise)


def test_a_function_is_async_however_it_is_given() -> None:
    class Judge:
        async def __call__(self, text: str, row: Any) -> float:
            return 1.0

        async def method(self) -> None: ...

        def plain(self) -> None: ...

    for function in (Judge(), Judge().method, functools.partial(Judge().method), Judge.method):
        assert is_async(function)
    for function in (Judge, Judge().plain, len, functools.partial(len), lambda: None):
        assert not is_async(function)
