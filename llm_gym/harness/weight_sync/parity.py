"""Parity: how far an engine's log-probabilities lie from the learner's, over tokens that the engine sampled.

The ratio of the two is what the loss reads as "how much has the policy moved since"; where it is not 1 before
any update, training starts off-policy without knowing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_gym.core import Episode, Sampling, StopReason
from llm_gym.harness.batching.packing import pack, sequences
from llm_gym.harness.learner.learner import Learner
from llm_gym.trajectories import TrajectoryBuilder

LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (5e-2, 1.0)}
"""Compute type -> largest mean and largest single gap (nats) that rounding explains. vLLM against transformers over
4,096 tokens: float32 at most 5.7e-6; bfloat16 at most 5.8e-2, mean 1.1e-2. A stale tied head is off by 3 to 5."""
CONTEXT, TOKENS, BETWEEN = 64, 32, 8
"""Longest first context, tokens of a completion, and tokens put between the two turns of an episode."""


@dataclass(frozen=True, slots=True)
class Parity:
    """|engine - learner| log-probability (nats) over the tokens that were sampled."""

    tokens: int
    mean: float
    worst: float
    dtype: str
    """The type that decides the limits."""

    @property
    def limits(self) -> tuple[float, float]:
        """The mean and the single gap above which something is wrong."""
        return LIMITS[self.dtype]

    @property
    def ok(self) -> bool:
        """Whether rounding explains the gap."""
        mean, worst = self.limits
        return self.mean <= mean and self.worst <= worst


def measure(learner: Learner, policy: Any, *, dtype: str, temperature: float = 1.0, tokens: int = 1024) -> Parity:
    """Lets `policy` sample at least `tokens` tokens in episodes of two turns, and computes them again in the learner.

    The second turn continues the first, so that the engine's prefix cache is measured too.

    Args:
        learner: whose weights `policy` serves.
        policy: a `Policy`.
        dtype: compute type of the coarser of the two, a key of `LIMITS`.
        temperature: at which both compute.
        tokens: least number of sampled tokens.
    """
    episodes = play(policy, learner.backbone.config.vocab_size, temperature, -(-tokens // (2 * TOKENS)))
    gaps = gaps_of(learner, episodes, temperature)
    return Parity(len(gaps), float(gaps.mean()), float(gaps.max()), dtype)


def play(policy: Any, vocabulary: int, temperature: float, episodes: int) -> list[Episode]:
    """Episodes of two turns after random contexts, always the same ones; nothing ends a completion but its length."""
    rng = np.random.default_rng(0)
    room = max(1, min(CONTEXT, policy.max_context - 2 * TOKENS - BETWEEN))
    prompts = [rng.integers(0, vocabulary, n).astype(np.int32) for n in rng.integers(1, room + 1, episodes)]
    sampling = Sampling(temperature=temperature, max_tokens=TOKENS, stop_token_ids=())
    builders = [TrajectoryBuilder() for _ in prompts]
    for turn in range(2):
        seeds = range(turn * episodes, (turn + 1) * episodes)
        for index, completion in enumerate(policy.generate(prompts, sampling, seeds=seeds)):
            builders[index].add(prompts[index], completion)
            between = rng.integers(0, vocabulary, BETWEEN).astype(np.int32)
            prompts[index] = np.concatenate([prompts[index], completion.tokens, between])
    return [Episode("parity", index, builder.build(), StopReason.ANSWERED) for index, builder in enumerate(builders)]


def gaps_of(learner: Learner, episodes: list[Episode], temperature: float) -> npt.NDArray[np.float64]:
    """|engine - learner| of every sampled token, float64 [tokens]; infinite where one is no number."""
    rows = [row for episode in episodes for row in sequences(episode, episode.seed)]
    found = []
    for batch in pack(rows, max_tokens=16384).micro:
        ours, _ = learner.logprobs(batch, temperature=temperature, entropy=False)
        found.append((ours.cpu().double() - batch.streams["old_logprobs"].double()).abs().numpy())
    gaps: npt.NDArray[np.float64] = np.concatenate(found)
    gaps[~np.isfinite(gaps)] = np.inf
    return gaps
