"""How far a policy has come from where its run began, measured on what it said then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llm_gym.core import Episode
from llm_gym.harness.algorithms.kl import k3
from llm_gym.harness.batching.packing import sequences
from llm_gym.harness.batching.shards import deal, dummy_batches, pack_shard
from llm_gym.harness.learner.learner import Learner

EPISODES = 16
"""As many are looked at: one short forward pass."""


def some_of(episodes: Iterable[Episode]) -> list[Episode]:
    """Those that are looked at: the first that did not fail."""
    return [episode for episode in episodes if not episode.stop_reason.failed][:EPISODES]


def kl_from_start(learner: Learner, episodes: Sequence[Episode], *, temperature: float, max_tokens: int) -> float:
    """KL(policy at the start || policy), nats a token: estimated without bias, never negative; NaN without a token.

    Every rank takes part.

    Args:
        learner: the policy as it is now.
        episodes: the same on every rank, none of them failed; sampled from the policy at the start, whose
            log-probabilities they hold.
        temperature: at which they were sampled.
        max_tokens: of a micro-batch.
    """
    rows = deal(learner.world, [row for i, episode in enumerate(episodes) for row in sequences(episode, i)])
    batch, total = pack_shard(learner.world, rows, max_tokens=max_tokens), 0.0
    idle = dummy_batches(learner.world, len(batch.micro))
    for micro in batch.micro:
        now, _ = learner.logprobs(micro, temperature=temperature, entropy=False)
        total += float(k3(micro.streams["old_logprobs"].to(now.device).double(), now.double()).sum())
    for micro in idle:
        learner.logprobs(micro, temperature=temperature, entropy=False)
    total = learner.world.add({"kl": total}, "comparing with the start")["kl"]
    return total / batch.tokens if batch.tokens else math.nan
