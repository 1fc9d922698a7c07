"""GuessNumber-v0: the game, and that the reference stays short."""

from __future__ import annotations

import inspect

import pytest

from llm_gym import StopReason
from llm_gym.envs import guess_number
from llm_gym.envs.guess_number import GuessNumber
from llm_gym.errors import ConfigError


def say(env, text):
    return env.step(env.chat.encode_reply(text))


@pytest.mark.parametrize("seed", range(20))
def test_bisection_finds_every_number_in_seven_guesses(seed):
    env = GuessNumber()
    env.reset(seed=seed)
    low, high = 1, 100
    for _ in range(7):
        guess = (low + high) // 2
        _, reward, terminated, _, info = say(env, f"I say {guess}")
        if terminated:
            break
        hint = info["messages"][-1]["content"]
        low, high = (guess + 1, high) if hint == "higher" else (low, guess - 1)
    assert (reward, terminated, guess) == (1.0, True, env.secret)
    assert info["rewards"]["found"] == 1.0


def test_every_secret_is_a_row():
    env = GuessNumber(low=-2, high=2)
    for row in range(5):
        env.reset(options={"task": row})
        assert say(env, str(row - 2))[2]


def test_turns_run_out_and_words_cost_a_little():
    env = GuessNumber(max_turns=2)
    env.reset(seed=1)
    assert say(env, "hm")[1] == pytest.approx(-0.1)
    *_, truncated, info = say(env, "9" * 5000 if env.max_tokens > 5000 else "999")
    assert (truncated, info["stop_reason"]) == (True, StopReason.TURN_LIMIT)
    assert info["rewards"] == {"format": -0.1, "found": 0.0}


def test_an_endless_number_is_just_too_high():
    env = GuessNumber(max_tokens=10_000, max_context=20_000)
    env.reset(seed=1)
    assert say(env, "9" * 5000)[4]["messages"][-1]["content"] == "lower"


def test_a_range_that_is_empty_is_refused():
    with pytest.raises(ConfigError, match="low, high: got 5 and 4"):
        GuessNumber(low=5, high=4)


def test_the_reference_environment_is_short():
    assert len(inspect.getsource(guess_number).splitlines()) < 60
