"""A real vLLM engine against the learner: the log-probabilities of every sampled token agree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llm_gym.core import Completion, Episode, Ids, Sampling, StopReason, Turn
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.harness.batching import Sample, pack
from llm_gym.harness.learner import Learner
from llm_gym.harness.model import load_model
from llm_gym.rollout import rollout

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")
CONTEXT = 512


@pytest.fixture(scope="module")
def policy() -> Iterator[object]:
    from llm_gym.policies.vllm import VLLMPolicy

    engine = VLLMPolicy(max_context=CONTEXT, dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(load_model(None))


def contexts(count: int) -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, 500, rng.integers(4, 100)).astype(np.int32) for _ in range(count)]


def gap(learner: Learner, prompts: list[Ids], completions: list[Completion], temperature: float) -> float:
    """Largest |engine - learner| log-probability over all sampled tokens."""
    played = [
        Episode("e", 0, (Turn(p, c, 0.0),), StopReason.ANSWERED) for p, c in zip(prompts, completions, strict=True)
    ]
    rows = [Sample(episode.rows()[0], 1.0, i) for i, episode in enumerate(played)]
    worst = 0.0
    for micro in pack(rows, max_tokens=4096).micro:
        logprobs, _ = learner.logprobs(micro, temperature=temperature)
        worst = max(worst, float((logprobs - micro.old_logprobs).abs().max()))
    return worst


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_4096_tokens_agree(policy, learner: Learner, temperature: float) -> None:
    prompts = contexts(64)
    sampling = Sampling(temperature=temperature, max_tokens=64, stop_token_ids=())
    completions = policy.generate(prompts, sampling, seeds=range(64))
    assert sum(len(c.tokens) for c in completions) == 4096
    assert gap(learner, prompts, completions, temperature) <= 1e-4


def test_a_weight_update_is_seen_and_a_missed_one_would_be(policy) -> None:
    model = load_model(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompts, sampling = contexts(16), Sampling(max_tokens=32, stop_token_ids=())
    before = policy.generate(prompts, sampling, seeds=range(16))
    assert gap(Learner(model), prompts, before, 1.0) > 0.1
    policy.load(model.state_dict().items(), version=7)
    after = policy.generate(prompts, sampling, seeds=range(16))
    assert {c.version for c in after} == {7}
    assert gap(Learner(model), prompts, after, 1.0) <= 1e-4
    policy.load(load_model(None).state_dict().items(), version=0)


def test_seeds_decide_and_stop_tokens_stay(policy, learner: Learner) -> None:
    prompts, sampling = contexts(8), Sampling(max_tokens=24, stop_token_ids=tuple(range(0, 500, 3)))
    one, two = (policy.generate(prompts, sampling, seeds=[5] * 8) for _ in range(2))
    assert [c.tokens.tolist() for c in one] == [c.tokens.tolist() for c in two]
    for completion in one:
        ends = [int(t) % 3 == 0 and t < 500 for t in completion.tokens]
        assert not any(ends[:-1])
        assert completion.finish_reason == ("stop" if ends[-1] else "length")


def test_episodes_run_on_it(policy, learner: Learner) -> None:
    episodes = rollout("Arithmetic-v0", policy, seeds=range(4), group_size=4, sampling=Sampling(max_tokens=40))
    assert [e.seed for e in episodes] == [s for s in range(4) for _ in range(4)]
    assert all(e.stop_reason in (StopReason.ANSWERED, StopReason.TOKEN_LIMIT) for e in episodes)
    prompts, completions = zip(*((e.turns[0].prompt, e.turns[0].completion) for e in episodes), strict=True)
    assert gap(learner, list(prompts), list(completions), 1.0) <= 1e-4


def test_an_overlong_context_is_data(policy) -> None:
    with pytest.raises(PolicyError, match="512"):
        asyncio.run(policy.complete(np.zeros(CONTEXT, np.int32), Sampling()))


def test_an_unknown_engine_argument_is_refused_before_loading() -> None:
    from llm_gym.policies.vllm import VLLMPolicy

    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        VLLMPolicy(gpu_memory_utilisation=0.5)


def test_an_engine_that_has_ended_refuses_and_never_hangs(policy) -> None:
    policy.close()
    with pytest.raises(PolicyError, match="ended"):
        asyncio.run(asyncio.wait_for(policy.complete(contexts(1)[0], Sampling()), timeout=60))
    with pytest.raises(PolicyError, match="ended"):
        policy.load(load_model(None).state_dict().items(), version=1)
