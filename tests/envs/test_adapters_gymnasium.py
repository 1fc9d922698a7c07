"""Gymnasium's and MiniGrid's environments in words; all of them: benchmarks/adapters.py."""

from __future__ import annotations

from typing import Any

import pytest

from llm_gym import check_environment
from llm_gym.envs import make
from llm_gym.errors import ConfigError


def played(replies: list[str], seed: int = 0, **kwargs: Any) -> tuple[Any, list[str], list[float], dict[str, Any]]:
    """(environment, what it said, rewards, last info) of replies."""
    env: Any = make("Gymnasium-v0", **kwargs).unwrapped
    _, info = env.reset(seed=seed)
    rewards = [float(env.step(env.chat.encode_reply(text))[1]) for text in replies[:-1]]
    if replies:
        _, reward, *_, info = env.step(env.chat.encode_reply(replies[-1]))
        rewards.append(float(reward))
    return env, [m["content"] for m in info["messages"] if m["role"] == "user"], rewards, info


@pytest.mark.parametrize("name", ["Blackjack-v1", "CartPole-v1", "MiniGrid-DoorKey-5x5-v0"])
def test_a_sample_conforms(name: str) -> None:
    check_environment("Gymnasium-v0", name=name, max_turns=6)


def test_frozen_lake_is_crossed_by_names_and_numbers() -> None:
    replies = ["I go down.", "not right but DOWN", "right", "2", "action 1", "up? no: right"]
    _, said, rewards, info = played(replies, config={"is_slippery": False})
    assert rewards == [0, 0, 0, 0, 0, 1]
    assert info["rewards"] == {"reward": 1.0, "format": 0.0}
    assert said[0].endswith("Reply with one action: left, down, right, up.\n[S]FFF\nFHFH\nFFFH\nHFFG")
    assert said[1] == "SFFF\n[F]HFH\nFFFH\nHFFG"


def test_a_reply_without_an_action_changes_nothing_and_costs_a_little() -> None:
    for text in ("", "downwards", "7", "-1", "1.5", "leftright"):
        _, said, rewards, _ = played([text, "right"], config={"is_slippery": False})
        assert rewards == [-0.1, 0.0], text
        assert said[1] == "Reply with one action: left, down, right, up."
        assert said[2].startswith("S[F]FF")


def test_minigrid_is_told_from_where_the_agent_stands() -> None:
    _, said, rewards, _ = played(["forward", "forward", "right", "forward", "forward"], name="MiniGrid-Empty-5x5-v0")
    assert said[0].splitlines() == [
        "Reply with one action: left, right, forward, pickup, drop, toggle, done.",
        "Mission: get to the green goal square. You face east.",
        "Ahead: 2 free, then wall. Left: 0 free, then wall. Right: 2 free, then wall.",
        "You see: goal 2 ahead 2 right.",
    ]
    assert "You face south." in said[3]
    assert "You see: goal 2 ahead." in said[3]
    assert rewards[-1] > 0.9


def test_what_is_carried_and_how_a_door_stands() -> None:
    env, said, *_ = played([], seed=3, name="MiniGrid-DoorKey-6x6-v0")
    assert "You see: locked yellow door 1 ahead 1 right; yellow key 2 ahead." in said[0]
    for text in ("forward", "pickup"):
        *_, info = env.step(env.chat.encode_reply(text))
    assert info["messages"][-1]["content"].endswith("You carry: yellow key.")


def test_taxi_says_what_its_colours_show() -> None:
    env, said, *_ = played([], name="Taxi-v4")
    _, _, place, goal = env.inner.unwrapped.decode(env.inner.unwrapped.s)
    assert f"The passenger: at {'RGYB'[place]}, going to {'RGYB'[goal]}." in said[0]


def test_numbers_have_names_and_actions_can_be_given() -> None:
    assert "your sum" in played([], name="Blackjack-v1")[1][0]
    said = played([], name="CartPole-v1", actions=["west", "east"], about="Balance.")[1][0]
    assert said.startswith("Balance.\nReply with one action: west, east.\nposition ")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"name": "Pendulum-v1"}, r"name: 'Pendulum-v1' has actions Box\(.*, want one of a list \(Discrete\)"),
        ({"name": "FrozenLakes-v1"}, "name: cannot make 'FrozenLakes-v1': .*FrozenLake"),
        ({"name": "MiniGrid-Empty-5x5-v9"}, "name: cannot make 'MiniGrid-Empty-5x5-v9'"),
        ({"config": {"slippery": True}}, "name: cannot make 'FrozenLake-v1': TypeError: .*slippery"),
        ({"name": "llm_gym/GuessNumber-v0"}, "has actions Tokens"),
    ],
)
def test_what_cannot_be_told_is_one_sentence(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make("Gymnasium-v0", **kwargs)
