"""The episode driver: whole groups whatever breaks, nobody waiting for anybody, nothing left behind."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections import Counter

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import teacher_forced

import llm_gym
from llm_gym.core import Completion, Sampling, StopReason, group
from llm_gym.episode_files import decode, encode
from llm_gym.errors import RewardError, SettingError
from llm_gym.policies import make_policy
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts import env_pool
from llm_gym.rollouts.driver import Driver, rollout, rollout_async
from llm_gym.spaces import Tokens


class Counting(gymnasium.Env):
    """Lasts `seed % 5 + 1` turns; keeps a book of everything that was made and closed."""

    metadata = {"render_modes": [], "blocking": False}  # noqa: RUF012
    observation_space = action_space = Tokens(10, 100)

    def __init__(self, book, fault=None):
        self.book, self.fault, self.seed, self.turn = book, fault or (lambda *where: None), None, 0
        self.fault("make", None, 0)
        book.append(self)
        self.closed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.turn, self.context = seed, 0, np.full(3, seed % 10, np.int32)
        self.fault("reset", seed, 0)
        return self.context, {"messages": [{"role": "user", "content": str(seed)}]}

    def step(self, action):
        self.turn += 1
        self.fault("step", self.seed, self.turn)
        self.context = np.concatenate([self.context, action, [0]]).astype(np.int32)
        done = self.turn > self.seed % 5
        return self.context, 1.0, done, False, {"messages": [{"role": "user", "content": f"turn {self.turn}"}]}

    def close(self):
        self.closed += 1
        self.fault("close", self.seed, self.turn)


class Blocking(Counting):
    metadata = {"render_modes": [], "blocking": True}  # noqa: RUF012


def said(seed, turns):
    return ScriptedPolicy([[seed]] * turns)


def later(seconds):
    """The running event loop's clock is ahead by so much from now on: what has a deadline before then runs into it."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds


def play(env=Counting, policy=None, *, seeds=range(20), book=None, fault=None, **options):
    book = [] if book is None else book
    return rollout(
        env, policy or ScriptedPolicy([[4, 5]]), seeds=seeds, env_args={"book": book, "fault": fault}, **options
    )


class TestOrder:
    def test_episodes_are_seed_major_and_complete(self):
        episodes = play(seeds=[7, 3, 7], group_size=4, max_concurrent=5)
        assert [(e.seed, e.member) for e in episodes] == [(s, m) for s in (7, 3, 7) for m in range(4)]
        assert len(group(episodes, 4)) == 3

    def test_short_episodes_are_not_favoured(self):
        seeds = np.random.default_rng(0).integers(0, 100, 300).tolist()
        ended = []
        episodes = play(seeds=seeds, max_concurrent=7, on_episode=ended.append)
        submitted = Counter(seed % 5 + 1 for seed in seeds)
        assert Counter(len(e.turns) for e in episodes) == submitted
        assert Counter(len(e.turns) for e in ended) == submitted

    def test_an_episode_is_its_ledger(self):
        episode = play(seeds=[2])[0]
        assert [len(turn.prompt) for turn in episode.turns] == [3, 6, 9]
        assert episode.reward == 3.0
        assert episode.rewards == {"reward": 3.0}
        assert episode.stop_reason is StopReason.ANSWERED
        assert episode.messages == ({"role": "user", "content": "turn 3"},)
        assert episode.env_id == "Counting"
        assert len(episode.trajectories) == 1

    def test_nobody_waits_for_anothers_turn(self):
        """Seed 0's policy call hangs until every other episode has ended: with a barrier none would."""
        ended, everyone = [], asyncio.Event()

        class Policy(ScriptedPolicy):
            async def complete(self, context, sampling, *, seed=None):
                if context[0] == 0:
                    await everyone.wait()
                return await super().complete(context, sampling)

        def note(episode):
            ended.append(episode.seed)
            if len(ended) == 4:
                everyone.set()

        play(policy=Policy([[1]]), seeds=range(5), on_episode=note)
        assert ended[-1] == 0

    def test_environments_are_reused(self):
        book = []
        with Driver(Counting, said(1, 1), env_args={"book": book}, max_concurrent=3) as driver:
            driver.run(range(10))
            driver.run(range(10))
            assert len(book) == 3
            assert [env.closed for env in book] == [0, 0, 0]
        assert [env.closed for env in book] == [1, 1, 1]


class TestRequests:
    def recorded(self, **options):
        calls = []

        class Policy(ScriptedPolicy):
            stop_ids = (9,)

            async def complete(self, context, sampling, *, seed=None):
                calls.append((len(context), sampling, seed))
                return await super().complete(context, sampling)

        env = options.pop("env", Counting)
        if env is Counting:
            play(policy=Policy([[4]]), **options)
        else:
            rollout(env, Policy([[4]]), **options)
        return calls

    def test_the_random_stream_is_a_hash_of_run_seed_episode_seed_member_and_turn(self):
        seen = [seed for _, _, seed in self.recorded(seeds=range(20), group_size=3)]
        again = [seed for _, _, seed in self.recorded(seeds=range(20), group_size=3, max_concurrent=2)]
        other = [seed for _, _, seed in self.recorded(seeds=range(20), group_size=3, seed=1)]
        assert len(set(seen)) == len(seen) == 180
        assert set(again) == set(seen)
        assert not set(other) & set(seen)
        assert seen[0] == 11619761522075635141  # the same on every machine

    def test_limits_and_stop_tokens_are_the_environments(self):
        args = {"max_tokens": 12, "max_context": 60}
        env = llm_gym.envs.make("GuessNumber-v0", **args)
        for length, sampling, _ in self.recorded(env="GuessNumber-v0", seeds=range(4), env_args=args):
            assert sampling.max_tokens == min(12, 60 - length)
            assert sampling.stop_token_ids == tuple(sorted({9, *env.unwrapped.chat.stop_ids}))
        chosen = Sampling(0.5, max_tokens=7, top_k=3, stop_token_ids=(5,))
        calls = self.recorded(env="GuessNumber-v0", seeds=range(4), sampling=chosen)
        assert {sampling for _, sampling, _ in calls} == {chosen}

    def test_a_cut_completion_is_graded_and_ends_the_episode_as_truncated(self):
        for seed in (0, 3):  # the environment thinks: answered; goes on
            episode = play(policy=ScriptedPolicy([[4] * 9]), seeds=[seed], sampling=Sampling(max_tokens=5))[0]
            assert episode.stop_reason is StopReason.TOKEN_LIMIT
            assert not episode.stop_reason.terminated
            assert episode.reward == 1.0
            assert len(episode.turns) == 1

    def test_what_an_environment_takes_for_an_answer_is_none_if_it_was_cut(self):
        """`sampling.max_tokens` is below the environment's own: only the policy knows that the reply was cut."""
        policy = ScriptedPolicy(["Answer: 1, and then on and on"], llm_gym.Chat(llm_gym.load_tokenizer(None)))
        episode = rollout("Arithmetic-v0", policy, seeds=[0], sampling=Sampling(max_tokens=4))[0]
        assert len(episode.turns[0].completion.tokens) == 4
        assert episode.stop_reason is StopReason.TOKEN_LIMIT


class TestFailures:
    @settings(deadline=None, max_examples=80)
    @given(
        faults=st.sets(
            st.tuples(st.sampled_from(["reset", "step", "close", "complete"]), st.integers(0, 9), st.integers(0, 4)),
            max_size=12,
        ),
        bad_makes=st.sets(st.integers(1, 8)),
        concurrent=st.integers(1, 9),
        env=st.sampled_from([Counting, Counting, Counting, Blocking]),
    )
    def test_exceptions_anywhere_leave_groups_whole_and_others_alone(self, faults, bad_makes, concurrent, env):
        book, makes = [], []

        def fault(what, seed, turn):
            if what == "make":
                makes.append(1)
                if len(makes) - 1 in bad_makes:
                    raise OSError("no room")
            elif (what, seed, turn) in faults:
                raise RuntimeError(f"{what} broke")

        class Policy(ScriptedPolicy):
            async def complete(self, context, sampling, *, seed=None):
                if ("complete", context[0], (len(context) - 3) // 3) in faults:
                    raise RuntimeError("complete broke")
                return await super().complete(context, sampling)

        policy = Policy([[4, 5]])
        episodes = play(env, policy, seeds=range(10), group_size=2, book=book, fault=fault, max_concurrent=concurrent)
        assert [(e.seed, e.member) for e in episodes] == [(s, m) for s in range(10) for m in range(2)]
        assert all(made.closed == 1 for made in book)
        for episode in episodes:
            if episode.error == "OSError: no room":
                assert episode.stop_reason is StopReason.ENV_ERROR
                continue
            story = [("reset", 0)] + [(w, t) for t in range(1, episode.seed % 5 + 2) for w in ("complete", "step")]
            trouble = [w for w, t in story if (w, episode.seed, t - (w == "complete")) in faults]
            want = {None: "answered", "reset": "env_error", "step": "env_error", "complete": "policy_error"}
            assert episode.stop_reason == want[trouble[0] if trouble else None]
            assert episode.error == (f"RuntimeError: {trouble[0]} broke" if trouble else None)
            assert episode.stop_reason.failed == bool(trouble)

    @pytest.mark.parametrize(
        "nonsense",
        [None, "1", float("nan"), float("-inf"), [1.0], np.ones(2), 10**400, RewardError("no verdict")],
        ids=str,
    )
    @pytest.mark.parametrize("where", ["reward", "component"])
    def test_a_reward_that_is_none_ends_its_episode_alone(self, nonsense, where):
        class Judge(Counting):
            def step(self, action):
                if self.seed == 3 and isinstance(nonsense, Exception):
                    raise nonsense
                value = nonsense if self.seed == 3 else 0.5
                context, _, done, truncated, info = super().step(action)
                reward, part = (value, 0.5) if where == "reward" else (0.5, value)
                return context, reward, done, truncated, {**info, "rewards": {"taste": part}}

        book = []
        episodes = play(Judge, seeds=range(5), group_size=2, book=book)
        for episode in episodes:
            broken = episode.seed == 3
            assert episode.stop_reason is (StopReason.REWARD_ERROR if broken else StopReason.ANSWERED)
            assert episode.stop_reason.failed == broken
            name = repr("reward" if where == "reward" else "taste")
            said = (
                "RewardError: no verdict" if isinstance(nonsense, Exception) else f"Judge: {name} is .* at seed 3, want"
            )
            assert re.search(said, episode.error) if broken else episode.error is None
        groups = group(episodes, 2)
        assert np.isnan(groups[3].rewards).all()
        assert all(np.isfinite(g.rewards).all() for g in groups if g.seed != 3)

    def test_a_row_asked_for_is_played_and_recorded(self, tmp_path):
        data = tmp_path / "qa.jsonl"
        data.write_text("".join(f'{{"prompt": "q{i}", "answer": "{i}"}}\n' for i in range(9)))
        args = {"dataset": str(data), "max_tokens": 4}
        with Driver("Dataset-v0", ScriptedPolicy([[4, 5]]), env_args=args, name="mine") as driver:
            episodes = driver.run([11, 12, 13], rows=[4, None, 8], group_size=2)
        assert [e.task for e in episodes] == [4, 4, None, None, 8, 8]
        assert [e.messages[0]["content"] for e in episodes[::2]][::2] == ["q4", "q8"]
        assert {e.env_id for e in episodes} == {"mine"}
        assert [decode(encode(e)).task for e in episodes] == [e.task for e in episodes]

    def test_settings_that_every_episode_would_run_into_are_raised(self):
        policy = said(1, 1)
        with pytest.raises(SettingError, match="did you mean 'GSM8K-v0'"):
            rollout("GSM8-v0", policy, seeds=[1])
        with pytest.raises(SettingError, match=r"Counting.*book"):
            rollout(Counting, policy, seeds=[1])
        with pytest.raises(SettingError, match="max_concurrent"):
            rollout(Counting, policy, seeds=[1], max_concurrent=0)
        book = []

        def fault(what, seed, turn):
            if (what, seed) == ("step", 7):
                raise SettingError("a wrong setting")

        with pytest.raises(SettingError, match="a wrong setting"):
            play(seeds=range(10), book=book, fault=fault)
        assert all(env.closed == 1 for env in book)

    @pytest.mark.parametrize("env", [Counting, Blocking])
    def test_a_policy_that_never_answers_runs_into_the_time_limit(self, env):
        class Policy(ScriptedPolicy):
            async def complete(self, context, sampling, *, seed=None):
                if context[0] == 3 and len(context) > 3:
                    await asyncio.Event().wait()
                return await super().complete(context, sampling)

        book, ended = [], []

        def note(episode):
            ended.append(episode)
            if len(ended) == 4:
                later(3600)

        episodes = play(env, Policy([[4, 5]]), seeds=range(5), book=book, time_limit=3000, on_episode=note)
        assert [str(e.stop_reason) for e in episodes] == ["answered"] * 3 + ["time_limit", "answered"]
        assert len(episodes[3].turns) == 1
        assert episodes[3].error is None
        assert all(env.closed == 1 for env in book)

    def test_a_step_that_hangs_holds_nobody_up_and_is_closed_when_it_comes_back(self):
        book, ended, release = [], [], threading.Event()

        def fault(what, seed, turn):
            if (what, seed) == ("step", 3):
                assert release.wait(60)

        def note(episode):
            ended.append(episode)
            if len(ended) == 8:
                later(3600)

        options = {"book": book, "fault": fault, "time_limit": 3000, "on_episode": note}
        episodes = play(Blocking, seeds=range(5), group_size=2, **options)
        reasons = [str(e.stop_reason) for e in episodes]
        assert reasons == ["answered"] * 6 + ["time_limit"] * 2 + ["answered"] * 2
        assert sum(env.closed for env in book) == len(book) - 2
        threads = [t for t in threading.enumerate() if t.name == "llm_gym-env"]
        release.set()
        for thread in threads:
            thread.join(60)
        assert all(env.closed == 1 for env in book)


HANGING = """
import sys, time
import gymnasium, numpy
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import rollout
from llm_gym.spaces import Tokens

class Hangs(gymnasium.Env):
    metadata = {"render_modes": [], "blocking": True}
    observation_space = action_space = Tokens(10, 100)
    made = 0

    def __init__(self):
        Hangs.made += 1
        self.maybe("make" if Hangs.made > 1 else "make the first")  # which is made where the event loop runs

    def maybe(self, what):
        if what == sys.argv[1]:
            sys.stdout.write("hangs\\n")
            sys.stdout.flush()
            time.sleep(3600)

    def reset(self, *, seed=None, options=None):
        self.maybe("reset")
        return numpy.zeros(3, numpy.int32), {}

    def step(self, action):
        self.maybe("step")

rollout(Hangs, ScriptedPolicy([[4]]), seeds=range(4))
"""
"""A program whose environments hang in the call that its argument names."""


@pytest.fixture
def patient(monkeypatch):
    """Environments whose calls come back are waited for, however long this machine takes to let them."""
    monkeypatch.setattr(env_pool, "BRIEF", 60.0)
    monkeypatch.setattr(env_pool, "PATIENCE", 60.0)


class TestStopping:
    @pytest.mark.parametrize("env", [Counting, Blocking])
    def test_cancelling_closes_everything(self, env, patient):
        book, reached, before = [], threading.Event(), set(threading.enumerate())

        class Policy(ScriptedPolicy):
            async def complete(self, context, sampling, *, seed=None):
                if len(context) > 6:
                    reached.set()
                    await asyncio.Event().wait()
                return await super().complete(context, sampling)

        async def scenario():
            options = {"seeds": range(20), "env_args": {"book": book}}
            task = asyncio.ensure_future(rollout_async(env, Policy([[4, 5]]), **options))
            while not reached.is_set():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(scenario())
        assert book
        assert all(env.closed == 1 for env in book)
        assert not [t for t in threading.enumerate() if t.name == "llm_gym-env" and t not in before]

    @pytest.mark.parametrize("how", ["signal", "exception"])
    def test_ctrl_c_closes_everything(self, how):
        book = []

        def fault(what, seed, turn):
            if (what, seed, turn) == ("step", 13, 2):
                if how == "exception":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            play(book=book, fault=fault)
        assert book
        assert all(env.closed == 1 for env in book)

    def test_a_call_that_is_under_way_may_end_before_its_environment_is_closed(self, patient):
        """Ctrl-C while every environment waits for a tool: they are closed, because their tools answer soon."""
        book, inside, interrupted = [], threading.Semaphore(0), threading.Event()

        def fault(what, seed, turn):
            if what == "step":
                inside.release()
                assert interrupted.wait(60)

        async def scenario():
            task = asyncio.ensure_future(
                rollout_async(
                    Blocking, ScriptedPolicy([[4, 5]]), seeds=range(8), env_args={"book": book, "fault": fault}
                )
            )
            for _ in range(8):
                await asyncio.to_thread(inside.acquire)
            task.cancel()
            asyncio.get_running_loop().call_soon(interrupted.set)
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(scenario())
        assert len(book) == 8
        assert all(env.closed == 1 for env in book)

    @pytest.mark.parametrize("where", ["make", "reset", "step"])
    def test_ctrl_c_ends_a_program_whose_environments_hang(self, where):
        """Nothing may keep the interpreter from exiting; the environments hang for an hour."""
        program = [sys.executable, "-c", HANGING, where]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                for _ in range(3):
                    assert process.stdout.readline() == "hangs\n"
                process.send_signal(signal.SIGINT)
                _, error = process.communicate(timeout=120)
            finally:
                process.kill()
        assert "KeyboardInterrupt" in error
        assert "did not close and are left behind" in error
        assert process.returncode in (1, -signal.SIGINT, 128 + signal.SIGINT)

    def test_a_driver_goes_on_after_an_interruption(self):
        book, once = [], []

        def fault(what, seed, turn):
            if (what, seed, turn) == ("step", 4, 2) and not once:
                once.append(1)
                raise KeyboardInterrupt

        with Driver(Counting, said(1, 1), env_args={"book": book, "fault": fault}) as driver:
            with pytest.raises(KeyboardInterrupt):
                driver.run(range(10))
            assert {str(e.stop_reason) for e in driver.run(range(10))} == {"answered"}

    def test_it_works_where_a_loop_is_running(self):
        async def notebook():
            return play(seeds=range(6)), await rollout_async(
                Counting, ScriptedPolicy([[4, 5]]), seeds=range(6), env_args={"book": []}
            )

        blocking, free = asyncio.run(notebook())
        for a, b in zip(blocking, free, strict=True):
            assert [t.completion.tokens.tolist() for t in a.turns] == [t.completion.tokens.tolist() for t in b.turns]


class TestBlockingEnvironments:
    def test_calls_are_off_the_loop_each_environment_in_one_thread(self):
        where, together = {}, threading.Barrier(4)

        def fault(what, seed, turn):
            if what == "step" and turn == 1:
                together.wait(60)  # passes only if four environments step at the same time
            if what in ("reset", "step"):
                where.setdefault(seed, set()).add(threading.get_ident())

        play(Blocking, seeds=range(4), fault=fault)
        assert all(len(threads) == 1 for threads in where.values())
        assert len(set.union(*where.values())) == 4
        assert threading.get_ident() not in set.union(*where.values())

    def test_cheap_environments_run_in_the_loop(self):
        where = set()
        play(fault=lambda what, seed, turn: where.add(threading.get_ident()))
        assert where == {threading.get_ident()}


class Mute(Exception):
    """One whose words cannot be had."""

    def __str__(self):
        raise RuntimeError


@pytest.mark.timeout(120)
@pytest.mark.parametrize("env", [Counting, Blocking])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StopIteration, "StopIteration"),
        (SystemExit, "SystemExit"),
        (Mute, "Mute"),
        (asyncio.CancelledError, "not by its driver"),
    ],
)
def test_whatever_an_environment_raises_ends_its_episode_and_nothing_else(env, error, words):
    def fault(what, seed, turn):
        if (what, seed) == ("step", 3):
            raise error

    ended = {episode.seed: episode for episode in play(env, seeds=range(5), fault=fault)}
    assert [seed for seed in ended if ended[seed].stop_reason.failed] == [3]
    assert ended[3].stop_reason == StopReason.ENV_ERROR
    assert words in ended[3].error


class Chatter(llm_gym.TextEnv):
    """Lasts 1 to 5 turns, whatever is said, and answers at uneven length."""

    def open(self):
        self.left = int(self.np_random.integers(1, 6))
        return [{"role": "user", "content": f"Say {self.left} things."}]

    def reply(self, text):
        self.left -= 1
        more = [{"role": "user", "content": "Go on. " * int(self.np_random.integers(1, 5))}]
        return llm_gym.Reply(more, reward=1.0, done=self.left == 0)


def chatter(policy, *, seeds=range(16), **options):
    """Uneven episodes of the embedded model: hot, and with many stop tokens, so that lengths vary."""
    sampling = Sampling(temperature=3.0, max_tokens=60, stop_token_ids=tuple(range(10, 560, 36)))
    return rollout(Chatter, policy, seeds=seeds, group_size=4, sampling=sampling, **options)


class TestWithTheRealEngine:
    def test_log_probabilities_are_those_of_a_plain_forward_over_the_rows(self):
        policy = make_policy(None, device="cpu")
        episodes = chatter(policy)
        assert len({len(e.turns) for e in episodes}) == 5
        assert len({len(turn.completion.tokens) for e in episodes for turn in e.turns}) > 30
        for episode in episodes:
            (played,) = episode.trajectories
            assert len(played.sampled) == episode.tokens_generated
            want = teacher_forced(policy.model, played.tokens[:1], played.tokens[1:], temperature=3.0)
            assert np.abs(want[played.sampled - 1] - played.logprobs).max() < 3e-5

    def test_the_number_under_way_changes_nothing(self):
        exact = make_policy(None, dtype=torch.float64, device="cpu")
        tokens = [
            [
                turn.completion.tokens.tolist()
                for episode in chatter(exact, seeds=range(3), max_concurrent=concurrent)
                for turn in episode.turns
            ]
            for concurrent in (1, 5, None)
        ]
        assert tokens[0] == tokens[1] == tokens[2]

    def test_nothing_that_came_before_changes_a_bit(self):
        policy = make_policy(None, device="cpu")
        before = chatter(policy)
        policy.generate([turn.prompt for turn in before[3].turns], Sampling())
        rollout("Arithmetic-v0", policy, seeds=range(9))
        for a, b in zip(before, chatter(policy), strict=True):
            for x, y in zip(a.turns, b.turns, strict=True):
                assert np.array_equal(x.completion.tokens, y.completion.tokens)
                assert np.array_equal(x.completion.logprobs, y.completion.logprobs)

    def test_a_failing_engine_fails_episodes_not_the_run(self):
        policy = make_policy(None, device="cpu")
        with torch.no_grad():
            policy.model.model.norm.weight.fill_(torch.nan)
        episodes = chatter(policy)
        assert {e.stop_reason for e in episodes} == {StopReason.POLICY_ERROR}
        assert "finite" in episodes[0].error


@pytest.mark.parametrize(
    "first", ["import llm_gym", "import llm_gym.rollouts.driver", "from llm_gym.rollouts.driver import Driver"]
)
def test_the_public_name_can_be_called_whatever_was_imported_first(first):
    code = f"{first}; import llm_gym; assert llm_gym.rollout('Arithmetic-v0', None, seeds=[]) == []"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_completion_may_come_from_anywhere():
    """Any object with `complete` is a policy."""

    class Mine:
        version = 3

        async def complete(self, context, sampling, *, seed=None):
            return Completion(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 3)

    episodes = play(policy=Mine(), seeds=range(3))
    assert episodes[2].turns[0].completion.version == 3
