"""The conformance suite: every registered environment passes, and every planted fault is found."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from typing import ClassVar

import gymnasium
import numpy as np
import pytest

import llm_gym
from llm_gym import Reply, StopReason, TextEnv, check_environment
from llm_gym.envs import TABLE
from llm_gym.errors import SettingError


def reward(text, row):
    return {"length": float(len(text)), "even": len(text) % 2 == 0}


@pytest.mark.parametrize("name", [name for name, (entry, _) in TABLE.items() if ".adapters." not in entry])
def test_every_registered_environment_conforms(name, tmp_path):
    (tmp_path / "qa.jsonl").write_text("".join(f'{{"prompt": "{n}?"}}\n' for n in range(9)))
    args = {
        "GSM8K-v0": {"dataset": "sample"},
        "Dataset-v0": {"dataset": str(tmp_path / "qa.jsonl"), "reward": reward, "reward_weights": {"even": 0.5}},
    }
    check_environment(name, **args.get(name, {}))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Arithmetic-v0", {"operations": "+-*", "digits_max": 5, "worked_example": True, "split": "test"}),
        ("Arithmetic-v0", {"max_tokens": 3}),
        ("GuessNumber-v0", {"system_prompt": "Be brief.", "reward_weights": {"format": 0}, "max_context": 300}),
        ("GSM8K-v0", {"dataset": "sample", "split": "train[:50%]", "instruction": ""}),
    ],
)
def test_with_other_arguments(name, kwargs):
    check_environment(name, **kwargs)


class Good(TextEnv):
    """Two turns about a drawn number; the faults below are planted in it."""

    turns: ClassVar[int] = 2

    def open(self):
        self.number, self.turn = self.draw_task(50), 0
        return [{"role": "user", "content": f"Number {self.number}?"}]

    def reply(self, text):
        self.turn += 1
        score = float(str(self.number) in text)
        if self.turn == self.turns:
            return Reply(reward={"right": score}, done=True)
        return Reply(
            messages=[{"role": "user", "content": f"And {self.np_random.integers(9)}?"}], reward={"right": score}
        )


class SeedIgnored(Good):
    turns = 1

    def open(self):
        self.task = 7
        return super().open()


class TaskIgnored(Good):
    num_tasks = 50

    def draw_task(self, size):
        return int(self.np_random.integers(size))


class SeedNotPassedOn(Good):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None, options=options)


class OtherRandomness(Good):
    def open(self):
        super().open()
        return [{"role": "user", "content": f"Number {random.random()}?"}]


class ClockInInfo(Good):
    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "time": time.perf_counter()}


class Memory(Good):
    """The second episode knows of the first."""

    episodes = 0

    def open(self):
        self.episodes += 1
        super().open()
        return [{"role": "user", "content": f"Episode {self.episodes}"}]


class SharedState(Good):
    """The instances of the class have one number between them."""

    shared: ClassVar[dict[str, int]] = {}

    def open(self):
        messages = super().open()
        self.shared["number"] = self.number
        return messages

    def reply(self, text):
        self.number = self.shared["number"]
        return Reply(messages=[{"role": "user", "content": str(self.number)}], done=super().reply(text).done)


class ReencodedHistory(Good):
    def step(self, action):
        _, *rest = super().step(action)
        return self.chat.open(self._messages), *rest


class SilentRewrite(Good):
    def step(self, action):
        obs, *rest, info = super().step(action)
        if "stop_reason" not in info:
            obs = obs[1:]
        return obs, *rest, info


class Wide(Good):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs.astype(np.int64), *rest


class OutOfVocabulary(Good):
    def step(self, action):
        obs, *rest = super().step(action)
        obs[-1] = self.chat.vocab_size
        return obs, *rest


class BoxSpace(Good):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gymnasium.spaces.Box(0, 500, (4,), np.int32)


class InfiniteReward(Good):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("inf"), *rest


class LostReward(Good):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + 0.125, *rest


class NumpyBool(Good):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, np.bool_(terminated), truncated, info


class NoStopReason(Good):
    def step(self, action):
        *rest, info = super().step(action)
        info.pop("stop_reason", None)
        return *rest, info


class StopReasonIsText(Good):
    def step(self, action):
        *rest, info = super().step(action)
        if "stop_reason" in info:
            info["stop_reason"] = "done"
        return *rest, info


class TruncatedTakenForTerminated(Good):
    def step(self, action):
        *rest, info = super().step(action)
        if "stop_reason" in info:
            info["stop_reason"] = StopReason.TURN_LIMIT
        return *rest, info


class NoMessages(Good):
    def step(self, action):
        *rest, info = super().step(action)
        info.pop("messages")
        return *rest, info


class LastReplyMissing(Good):
    def step(self, action):
        *rest, info = super().step(action)
        if "stop_reason" in info:
            info["messages"].pop()
        return *rest, info


class BufferReused(Good):
    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self._context = obs
        return obs, info

    def step(self, action):
        obs, *rest = super().step(action)
        if self._context is not None:
            self._context = obs
        return obs, *rest


class MessagesReused(Good):
    def _copy_messages(self):
        return self._messages


class StepAfterTheEnd(Good):
    def step(self, action):
        before = self._context
        result = super().step(action)
        if self._context is None:
            self._context = before
        return result


class Endless(Good):
    turns = -1

    def __init__(self, **kwargs):
        super().__init__(max_context=10**7, **kwargs)


class CutIsAnswered(Good):
    turns = 1

    def _stop_reason(self, reply):
        return StopReason.ANSWERED if reply.done else None


class ThreadLeft(Good):
    release: ClassVar[threading.Event] = threading.Event()

    def open(self):
        threading.Thread(target=self.release.wait, name="left over", daemon=True).start()
        return super().open()


class ProcessLeft(Good):
    children: ClassVar[list[subprocess.Popen]] = []

    def open(self):
        if not self.children or len(self.children) < 200:
            self.children.append(subprocess.Popen(["sleep", "60"]))
        return super().open()


class SocketLeft(Good):
    sockets: ClassVar[list[socket.socket]] = []

    def open(self):
        self.sockets.append(socket.socket())
        return super().open()


class CloseFails(Good):
    closed = False

    def close(self):
        assert not self.closed, "closed twice"
        self.closed = True


class ConstantRandomness(Good):
    """Draws, but from a generator that the seed does not reach."""

    turns = 1

    def open(self):
        self.np_random = np.random.default_rng(0)
        return super().open()


class Fixed(Good):
    """One question, and nothing to draw."""

    turns = 1
    metadata: ClassVar = {**Good.metadata, "fixed_start": True}

    def draw_task(self, size):
        return 7


class AlikeByChance(Good):
    """A rare second question, which none of the seeds draws."""

    turns = 1

    def draw_task(self, size):
        return int(self.np_random.random() < 1e-9)


class OneRow(Good):
    turns = 1
    num_tasks = 1

    def draw_task(self, size):
        return super().draw_task(1)


class NamedAlike(Good):
    """Arguments that are called as those of the checks and of `make`."""

    def __init__(self, *, env, env_id=None, subject=None, **kwargs):
        self.env = env
        super().__init__(**kwargs)


FAULTS = {
    ConstantRandomness: "gymnasium: .*random number generators are not different",
    SeedIgnored: "seeds: seeds 0 to 15 all give the same episode",
    TaskIgnored: "task option: resets to task 0 with seeds 3 and 4 show different rows",
    SeedNotPassedOn: "gymnasium: .*",
    OtherRandomness: "gymnasium: Deterministic step observations are not equivalent",
    ClockInInfo: "gymnasium: .*info",
    Memory: "gymnasium: Deterministic step observations are not equivalent",
    SharedState: "independence: seed 2, with another instance beside it, the episode differs: step 1",
    ReencodedHistory: "append only: step .*does not begin with",
    SilentRewrite: "append only: step 1, seed 0: the observation does not begin with the last one and the action",
    Wide: "spaces: step 1: the observation is not int32",
    OutOfVocabulary: "gymnasium: .*observation space",
    BoxSpace: "gymnasium: .*",
    InfiniteReward: "gymnasium: .*",
    LostReward: r"info: seed 0: the weighted components of info\['rewards'\] sum to",
    NumpyBool: "info: step 1, seed 0: terminated is",
    NoStopReason: r"info: step 2, seed 0: info\['stop_reason'\] is None, want a StopReason",
    StopReasonIsText: r"info: step 2, seed 0: info\['stop_reason'\] is 'done'",
    TruncatedTakenForTerminated: r"info: step 2, .*turn_limit wants \(terminated, truncated\) = \(False, True\)",
    NoMessages: r"info: step 1, seed 0: info\['messages'\] is None",
    LastReplyMissing: r"info: seed 0: info\['messages'\] holds 1 replies after 2 steps",
    BufferReused: "gymnasium: .*|fresh data: .*",
    MessagesReused: "fresh data: seed 1, with every returned observation and info overwritten",
    StepAfterTheEnd: r"order: step\(\) after the end did not raise ResetNeeded",
    Endless: "did not end within 500 steps",
    CutIsAnswered: r"length limit: a cut completion gives \(True, False",
    ThreadLeft: "close: left behind: .*thread 'left over'",
    ProcessLeft: "close: left behind: .*process",
    SocketLeft: "close: left behind: .*socket",
    CloseFails: "gymnasium: .*closed twice|close: closed twice",
}


def test_the_sound_environment_passes():
    check_environment(Good)
    check_environment(Good())


@pytest.mark.parametrize("kind", [Fixed, AlikeByChance, OneRow])
def test_episodes_may_be_alike_where_the_seed_is_not_ignored(kind):
    check_environment(kind)


def test_arguments_of_any_name_reach_the_environment():
    check_environment(NamedAlike, env="mine", env_id=3, subject=4)
    llm_gym.register("test/NamedAlike-v0", NamedAlike)
    try:
        check_environment("test/NamedAlike-v0", env="mine", env_id=3)
        gymnasium.make_vec("test/NamedAlike-v0", num_envs=2, env="mine", env_id=3).close()
    finally:
        del gymnasium.registry["test/NamedAlike-v0"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr("llm_gym.testing.GRACE_SECONDS", 0.0)
    ThreadLeft.release.clear()
    try:
        with pytest.raises(AssertionError, match=f"^{fault.__name__}: .*({FAULTS[fault]})"):
            check_environment(fault)
    finally:
        ThreadLeft.release.set()
        for child in ProcessLeft.children:
            child.kill()
            child.wait()
        for open_socket in SocketLeft.sockets:
            open_socket.close()


def test_an_unregistered_name_and_stray_arguments_are_refused():
    with pytest.raises(SettingError, match="did you mean 'Arithmetic-v0'"):
        check_environment("Aritmetic-v0")
    with pytest.raises(AssertionError, match="keyword arguments are for an id or a class"):
        check_environment(Good(), max_turns=3)
