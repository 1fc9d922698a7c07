"""Groups of Atropos environments: what they say arrives as it is, and what cannot be trained is refused in a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llm_gym import load_chat
from llm_gym.core import Episode, Group, Task
from llm_gym.episode_files import decode, encode
from llm_gym.harness.batching.packing import samples
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import Driver
from llm_gym.serving.scored_data import from_scored_data

ENV = "llm_gym/GuessNumber-v0"
TASK = Task(0, seed=5)


@pytest.fixture(scope="module")
def played() -> Group:
    """Two episodes of two turns; rewards and log-probabilities of their own."""
    with Driver(ENV, ScriptedPolicy(["50", "25"], load_chat(), version=3), env_args={"max_turns": 2}) as driver:
        episodes = driver.run([TASK.seed], group_size=2)
    return Group(TASK, tuple(with_numbers(episode, member) for member, episode in enumerate(episodes)))


def with_numbers(episode: Episode, member: int) -> Episode:
    (trajectory,) = episode.trajectories
    logprobs = -np.random.default_rng(member).exponential(size=len(trajectory.sampled)).astype(np.float32)
    spans = (*trajectory.spans[:-1], replace(trajectory.spans[-1], reward=0.25 + member))
    return replace(episode, trajectories=(replace(trajectory, streams={"logprobs": logprobs}, spans=spans),))


def scored(group: Group) -> dict[str, Any]:
    """A group as an Atropos environment would send it: what is not sampled is -100 in masks, 1.0 in log-probabilities."""
    rows = []
    for episode in group.episodes:
        (trajectory,) = episode.trajectories
        masks, logprobs = np.full(len(trajectory.tokens), -100), np.ones(len(trajectory.tokens), np.float32)
        masks[trajectory.sampled] = trajectory.tokens[trajectory.sampled]
        logprobs[trajectory.sampled] = trajectory.logprobs
        rows.append((trajectory.tokens.tolist(), masks.tolist(), logprobs.tolist(), episode.reward))
    tokens, masks_, logprobs_, scores = map(list, zip(*rows, strict=True))
    data = {"tokens": tokens, "masks": masks_, "inference_logprobs": logprobs_, "scores": scores}
    nothing: dict[str, Any] = {
        "advantages": None,
        "ref_logprobs": None,
        "overrides": None,
        "group_overrides": {},
        "images": [],
    }
    chats = [list(episode.messages) for episode in group.episodes]
    sent: dict[str, Any] = json.loads(json.dumps({**data, **nothing, "messages": chats, "env_id": 0}))
    return sent


def read(data: Mapping[str, Any]) -> Group:
    return from_scored_data(data, task=TASK, env_id=ENV, version=3)


def test_a_group_sent_in_their_form_comes_back(played: Group) -> None:
    group = read(scored(played))
    assert group.task == TASK
    np.testing.assert_array_equal(group.rewards, played.rewards)
    for ours, theirs in zip(played.episodes, group.episodes, strict=True):
        (a,), (b,) = ours.trajectories, theirs.trajectories
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.spans, ours.messages, ours.member) == (b.spans, theirs.messages, theirs.member)
        assert encode(decode(encode(theirs))) == encode(theirs)
    for ours_row, theirs_row in zip(samples([played]), samples([group]), strict=True):
        np.testing.assert_array_equal(ours_row.trained, theirs_row.trained)


def test_what_stands_behind_the_last_trained_token_is_left_out(played: Group) -> None:
    data = scored(played)
    data["tokens"][0] += [7, 8]
    data["masks"][0] += [-100, -100]
    data["inference_logprobs"][0] += [1.0, 1.0]
    for ours, theirs in zip(played.episodes, read(data).episodes, strict=True):
        np.testing.assert_array_equal(ours.trajectories[0].tokens, theirs.trajectories[0].tokens)


def test_an_episode_without_advantage_counts_in_the_baseline_and_is_not_trained(played: Group) -> None:
    group = read({**scored(played), "overrides": [{"set_advantage_to_zero": True}, {}]})
    np.testing.assert_array_equal(group.rewards, played.rewards)
    assert [len(row.trained) > 0 for row in samples([group])] == [False, True]


def changed(column: str, value: Any) -> Any:
    """Sets the first row of a column, or its first value."""
    return lambda data: data[column].__setitem__(0, value)


ROWS = ("tokens", "masks", "inference_logprobs")
WRONG: dict[str, tuple[Any, str]] = {
    "no log-probabilities": (lambda data: data.pop("inference_logprobs"), "inference_logprobs: there are none"),
    "advantages": (lambda data: data.update(advantages=[[0.5], [1.0]]), "advantages: a group has no place for them"),
    "a teacher": (lambda data: data.update(distill_token_ids=[[[1]], [[2]]]), "distill_token_ids: a group has no"),
    "images": (lambda data: data.update(images=["x", "y"]), "images: a group has no place"),
    "no tokens": (lambda data: data.pop("tokens"), "tokens: want a list, with a row for each of 0 sequences"),
    "a sequence without mask": (lambda data: data["masks"].pop(), "masks: want a list, with a row for each of 2"),
    "a sequence without score": (lambda data: data["scores"].pop(), "scores: want a list, with a row for each of 2"),
    "no column": (lambda data: data.update(scores=1.5), "scores: want a list"),
    "a short mask": (lambda data: data["masks"][0].pop(), "Sequence 0: want a list of ids"),
    "few log-probabilities": (lambda data: data["inference_logprobs"][1].pop(), "Sequence 1: want a list of ids"),
    "no list": (changed("tokens", 5), "Sequence 0: "),
    "a nested list": (
        lambda data: [data[name].__setitem__(0, [data[name][0]]) for name in data if name in ROWS],
        "ids",
    ),
    "half a token": (lambda data: data["tokens"][0].__setitem__(0, 1.5), "Sequence 0: want a list of ids"),
    "a huge token": (lambda data: data["tokens"][0].__setitem__(0, 2**40), "Sequence 0: "),
    "a text": (lambda data: data["tokens"][0].__setitem__(0, "five"), "Sequence 0: "),
    "a negative token": (lambda data: data["tokens"][0].__setitem__(0, -1), "token ids from -1"),
    "a mask of ones": (lambda data: changed("masks", [1] * len(data["masks"][0]))(data), "want a mask of -100 or"),
    "nothing trained": (lambda data: changed("masks", [-100] * len(data["masks"][0]))(data), "a token that is trained"),
    "the first token trained": (lambda data: changed("masks", data["tokens"][0])(data), "nothing stands before it"),
    "placeholders": (
        lambda data: changed("inference_logprobs", [1.0] * len(data["masks"][0]))(data),
        "log-probability",
    ),
    "not a number": (changed("scores", float("nan")), "a reward that is no finite number"),
    "no score": (changed("scores", None), "Sequence 0: "),
    "another override": (lambda data: data.update(overrides=[{"sft": True}, {}]), "overrides: got 'sft', want nothing"),
    "no override": (lambda data: data.update(overrides=[5, {}]), "Sequence 0: "),
    "no messages": (lambda data: data.update(messages=[["hello"], []]), "Sequence 0: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(what: str, played: Group) -> None:
    data = copy.deepcopy(scored(played))
    change, words = WRONG[what]
    change(data)
    with pytest.raises(ValueError, match=words) as error:
        read(data)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
