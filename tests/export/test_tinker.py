"""Our environments in tinker_cookbook's own rollouts."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "tinker_cookbook",
    reason="needs `pip install --no-deps tinker tinker-cookbook chz`: its pins exclude transformers 5.16",
)

import tinker
from tinker_cookbook.completers import TokenCompleter, TokensWithLogprobs
from tinker_cookbook.rl.rollouts import do_single_rollout
from tinker_cookbook.rl.types import Env

import llm_gym
from llm_gym.errors import LLMGymError
from llm_gym.export import tinker_env
from llm_gym.policies.scripted import ScriptedPolicy


class Ours(TokenCompleter):
    """A policy of ours as the cookbook calls one."""

    def __init__(self, policy: Any, cut: bool = False) -> None:
        self.policy, self.cut = policy, cut

    async def __call__(self, model_input: Any, stop: Any, *, max_tokens: int | None = None) -> TokensWithLogprobs:
        said = await self.policy.complete(
            np.array(model_input.to_ints(), np.int32),
            llm_gym.Sampling(max_tokens=64, stop_token_ids=tuple(stop)),
            seed=1,
        )
        return TokensWithLogprobs(said.tokens.tolist(), said.logprobs.tolist(), "length" if self.cut else "stop")


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("GuessNumber-v0", ["50", "What?", "75", "88"]),
        ("MCPTool-v0", ['<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>', "42"]),
    ],
)
def test_their_rollout_is_ours(env_id: str, says: list[str]) -> None:
    args = {"max_turns": 4}
    policy = ScriptedPolicy(says, llm_gym.load_chat())
    [episode] = llm_gym.rollout(env_id, policy, seeds=[7], env_args=args)
    env = tinker_env(env_id, 7, **args)
    assert isinstance(env, Env)
    theirs = asyncio.run(do_single_rollout(Ours(ScriptedPolicy(says, llm_gym.load_chat())), env))
    assert len(theirs.transitions) == len(episode.turns) > 1
    for step, turn in zip(theirs.transitions, episode.turns, strict=True):
        assert step.ob.to_ints() == turn.prompt.tolist()
        assert step.ac.tokens == turn.completion.tokens.tolist()
        assert step.reward == turn.reward
    metrics = theirs.transitions[-1].metrics
    assert {name.partition("/")[2]: v for name, v in metrics.items() if name.startswith("reward/")} == episode.rewards
    assert theirs.stop_reason == {"turn_limit": "max_turns", "answered": "completed"}[episode.stop_reason]


def test_a_completion_that_was_cut_ends_the_episode() -> None:
    policy = Ours(ScriptedPolicy(["50"], llm_gym.load_chat()), cut=True)
    theirs = asyncio.run(do_single_rollout(policy, tinker_env("GuessNumber-v0", 7)))
    assert (len(theirs.transitions), theirs.stop_reason) == (1, "max_tokens")


class Breaks(llm_gym.TextEnv):
    """Raises."""

    def open(self) -> Any:
        return [{"role": "user", "content": "?"}]

    def reply(self, text: str) -> Any:
        return llm_gym.Reply(stop_reason=llm_gym.StopReason.TOOL_FAILURE)


def test_an_episode_that_fails_raises() -> None:
    policy = Ours(ScriptedPolicy(["50"], llm_gym.load_chat()))
    with pytest.raises(LLMGymError, match="ended with tool_failure"):
        asyncio.run(do_single_rollout(policy, tinker_env(Breaks, 7)))


def test_an_observation_is_a_model_input() -> None:
    observation, stops = asyncio.run(tinker_env("GuessNumber-v0", 1).initial_observation())
    assert isinstance(observation, tinker.ModelInput)
    assert stops == list(llm_gym.load_chat().stop_ids)
