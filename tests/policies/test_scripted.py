"""The scripted policy: it says what it is told, and nothing else."""

import asyncio

import numpy as np
import pytest

import llm_gym
from llm_gym.core import Sampling
from llm_gym.errors import PolicyError
from llm_gym.policies import Policy
from llm_gym.policies.scripted import ScriptedPolicy


@pytest.fixture(scope="module")
def chat():
    return llm_gym.Chat(llm_gym.load_tokenizer(None))


def test_a_list_is_said_in_turn(chat):
    policy = ScriptedPolicy(["one", [5, 6]], chat, version=4)
    assert isinstance(policy, Policy)
    said = policy.generate([np.array([1])] * 3, Sampling())
    assert chat.text(said[0].tokens) == chat.text(said[2].tokens) == "one"
    assert said[0].tokens[-1] in chat.stop_ids
    assert said[1].tokens.tolist() == [5, 6]
    assert said[1].logprobs.tolist() == [0.0, 0.0]
    assert {c.version for c in said} == {4}


def test_a_function_sees_the_context():
    policy = ScriptedPolicy(lambda context: context[::-1])
    assert policy.generate([np.array([1, 2, 3])], Sampling())[0].tokens.tolist() == [3, 2, 1]


def test_long_replies_are_cut():
    done = ScriptedPolicy([[1, 2, 3]]).generate([np.array([1])], Sampling(max_tokens=2))[0]
    assert (done.tokens.tolist(), done.finish_reason) == ([1, 2], "length")
    done = ScriptedPolicy([[1, 2, 3]]).generate([np.array([1])], Sampling(max_tokens=3))[0]
    assert done.finish_reason == "stop"


@pytest.mark.parametrize(("reply", "said"), [("text", "pass chat="), ([], "empty")])
def test_what_it_cannot_say(reply, said):
    with pytest.raises(PolicyError, match=said):
        asyncio.run(ScriptedPolicy([reply]).complete(np.array([1]), Sampling()))


def test_the_reference_answers_are_graded_right(chat):
    """A whole rollout: the script reads the problem out of the context and answers it."""

    def answer(context):
        question = chat.tokenizer.decode(context).rpartition("user")[2]
        a, b = (int("".join(ch for ch in part if ch.isdigit())) for part in question.split("+"))
        return f"Answer: {a + b}"

    episodes = llm_gym.rollout("Arithmetic-v0", ScriptedPolicy(answer, chat), seeds=range(40))
    assert [e.reward for e in episodes] == [1.0] * 40
