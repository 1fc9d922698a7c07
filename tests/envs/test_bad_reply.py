"""Replies that a scorer can make nothing of, by their own fault: graded 0, trained on, counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

import llm_gym
from llm_gym import BadReply, Reply, StopReason, TextEnv, check_environment, rollout
from llm_gym.core import group
from llm_gym.envs.dataset import Dataset
from llm_gym.envs.tools import ToolEnv
from llm_gym.harness.algorithms.rewards import rewards_of
from llm_gym.harness.runs.metrics import describe
from llm_gym.harness.runs.verdict import alarms
from llm_gym.policies.scripted import ScriptedPolicy


def read(text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadReply("no JSON") from error


def score(text, row):
    return float(read(text) == row["want"])


def short(text, row):
    return float(len(text) < 9)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} as JSON?", "want": n}) + "\n" for n in range(4)))
    return str(path)


def answer(env, text, cut=False):
    env.reset(options={"task": 1})
    ids = env.chat.encode_reply(text)
    return env.step(np.resize(ids[:-1], env.max_tokens) if cut else ids)


@pytest.mark.parametrize(
    ("text", "reward", "stop"), [("1", 1.0, "answered"), ("2", 0.0, "answered"), ("one", 0.0, "bad_reply")]
)
def test_a_reward_function_says_that_a_reply_is_none(data, text, reward, stop):
    _, total, terminated, truncated, info = answer(Dataset(dataset=data, reward=score), text)
    assert (total, terminated, truncated, info["stop_reason"]) == (reward, True, False, StopReason(stop))
    assert info.get("error") == ("BadReply: no JSON" if stop == "bad_reply" else None)


def test_other_reward_functions_still_count(data):
    _, total, *_, info = answer(Dataset(dataset=data, reward=[score, short], reward_weights={"short": 0.25}), "one")
    assert (total, info["rewards"], info["stop_reason"]) == (0.25, {"short": 1.0}, "bad_reply")


def test_a_reply_that_was_cut_ends_as_cut(data):
    *_, terminated, truncated, info = answer(Dataset(dataset=data, reward=score, max_tokens=4), "one", cut=True)
    assert (terminated, truncated, info["stop_reason"]) == (False, True, "token_limit")


def test_a_scorer_that_takes_no_usual_reply_is_no_reason_to_stop(data):
    def strict(text, row):
        raise BadReply("never")

    env = Dataset(dataset=data, reward=strict)
    env.rehearse()
    assert answer(env, "1")[4]["stop_reason"] == "bad_reply"


class Json(TextEnv):
    """Two turns; the second must be JSON."""

    reward_names = ("said", "right")

    def open(self):
        self.turn, self.number = 0, int(self.np_random.integers(9))
        return [{"role": "user", "content": f"Say something, then {self.number}."}]

    def reply(self, text):
        self.turn += 1
        if self.turn == 1:
            return Reply([{"role": "user", "content": "Now the number."}], reward={"said": 0.5})
        return Reply(reward={"right": float(read(text) == self.number)}, done=True)


def test_it_ends_an_episode_of_several_turns_and_leaves_what_was_earned():
    check_environment(Json)
    env = Json()
    env.reset(seed=1)
    env.step(env.chat.encode_reply("hm"))
    _, total, terminated, _, info = env.step(env.chat.encode_reply("hm"))
    assert (total, terminated, info["rewards"]) == (0.0, True, {"said": 0.5, "right": 0.0})


def test_an_environment_with_tools_says_it_in_final():
    class Tools(ToolEnv):
        def open(self):
            return [{"role": "user", "content": "?"}]

        def final(self, text):
            return Reply(reward=float(read(text)), done=True)

    def nothing() -> str:
        """Does nothing."""
        return ""

    env = Tools([nothing])
    env.reset(seed=1)
    *_, info = env.step(env.chat.encode_reply("one"))
    assert (info["stop_reason"], info["error"]) == ("bad_reply", "BadReply: no JSON")
    env.close()


def test_such_episodes_are_trained_on_and_counted(data):
    chat = llm_gym.load_chat()
    policy = ScriptedPolicy([chat.encode_reply("1"), chat.encode_reply("one")] * 4)
    episodes = rollout(
        "llm_gym/Dataset-v0", policy, seeds=range(2), group_size=4, env_args={"dataset": data, "reward": score}
    )
    bad = [e for e in episodes if e.stop_reason is StopReason.BAD_REPLY]
    assert len(bad) == 4
    assert {(e.error, e.reward, e.stop_reason.failed) for e in bad} == {("BadReply: no JSON", 0.0, False)}
    assert np.isfinite(rewards_of(group(episodes, 4)).returns).all()
    row = describe(episodes)
    assert (row["episode/bad_reply_fraction"], row["episode/failed_fraction"]) == (0.5, 0.0)
    assert "scored 0 because the scorer could make nothing" in alarms(row)["episode/bad_reply_fraction"]
