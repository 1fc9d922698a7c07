"""The proof that the learner's weights arrived in the sampler: versions, checksums, canaries.

Weights can fail to arrive without any error: a tied head kept in a packed copy, a prefix cache made with the
old weights, one tensor missed by name. Training then goes on, off-policy by nats, and merely learns badly.
So after every synchronisation three things are looked at:

1. a checksum of every tensor that was sent, where the engine can compute them (it names those that differ);
2. canaries: the engine samples a few tokens after fixed contexts, and the learner computes their
   log-probabilities again. Checksums see every weight; canaries see what acts: caches, packed copies, kernels;
3. the version that those tokens carry.

How far canaries may lie apart depends on the engine's arithmetic. Over 4,096 tokens, vLLM and transformers
differed by at most 6e-6 nats in float32, and by at most 5.8e-2 (mean 1.1e-2) in bfloat16; a stale tied head or
prefix cache is off by 3 to 5 nats. In float32 the limit is `EXACT`. With any other type the gap is measured
when the run starts, and `MARGIN` times that is allowed. There a canary cannot see a small update that is
missing, but the checksums do; a cache that is no more out of date than that is within the engine's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_gym.core import Completion, Ids, Row, Sampling
from llm_gym.errors import SyncError
from llm_gym.harness.batching import Sample, pack
from llm_gym.harness.learner import Learner
from llm_gym.policies import Policy

EXACT = 1e-3
"""Largest gap (nats) between an engine and a learner that both compute in float32."""
MARGIN = 4.0
"""Others: how many times the gap at the start."""
LEAST = 0.1
"""Others: the limit is never below this (nats), twice the largest gap seen in bfloat16."""
ABSURD = 1.0
"""Others: a gap (nats) that no rounding explains; a run does not start with it."""

PROMPTS, CONTEXT, TOKENS = 2, 72, 2
"""Contexts, their length (two blocks of a prefix cache, and some), tokens sampled after each: the first comes from
the prefill, the second from the decoding step."""
FIRST = 16
"""Tokens sampled after each context to find the gap at the start."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """Fixed contexts, and how completions of them are drawn."""

    contexts: tuple[Ids, ...]
    temperature: float
    """The run's: engine and learner must agree on the distribution that is trained."""

    @classmethod
    def of(cls, vocabulary: int, room: int, temperature: float) -> Canaries:
        """Random contexts, always the same ones.

        Args:
            vocabulary: ids are drawn below it.
            room: the engine's longest context; canaries take no more than half of it.
            temperature: the run's.
        """
        length = max(1, min(CONTEXT, room // 2))
        ids = np.random.default_rng(0).integers(0, vocabulary, (PROMPTS, length)).astype(np.int32)
        return cls(tuple(ids), temperature)

    def complete(self, policy: Policy, tokens: int = TOKENS) -> list[Completion]:
        """What the engine samples after each context; the same seeds every time."""
        sampling = Sampling(temperature=self.temperature, max_tokens=tokens, stop_token_ids=())
        return policy.generate(self.contexts, sampling, seeds=range(len(self.contexts)))

    def gap(self, learner: Learner, completions: Iterable[Completion]) -> float:
        """Largest |engine - learner| log-probability (nats) of a sampled token; infinite if one is no number."""
        pairs = zip(self.contexts, completions, strict=True)
        rows = [Sample(_row(context, completion), 1.0, i) for i, (context, completion) in enumerate(pairs)]
        worst = 0.0
        for batch in pack(rows, max_tokens=1 << 30).micro:
            ours, _ = learner.logprobs(batch, temperature=self.temperature, entropy=False)
            apart = (ours - batch.old_logprobs.to(ours.device)).abs()
            worst = max(worst, float(apart.nan_to_num(nan=np.inf, posinf=np.inf).max()))
        return worst


class Proof:
    """Compares what an engine serves with the learner; the first time it also finds what gap is normal.

    Args:
        learner: what the weights should be.
        policy: what they should have arrived in.
        canaries: what is sampled.
        exact: whether engine and learner both compute in float32.
        limit: the largest gap (nats) that is no error, if somebody chose it; None: see the module's text.
    """

    def __init__(
        self, learner: Learner, policy: Any, canaries: Canaries, *, exact: bool, limit: float | None = None
    ) -> None:
        self.learner, self.policy, self.canaries = learner, policy, canaries
        self.limit = EXACT if limit is None and exact else limit
        """None until the first gap was measured."""

    def __call__(self, expected: Mapping[str, int], *, version: int, how: str) -> float:
        """Returns the canaries' gap (nats) if the engine serves the learner's weights as `version`.

        Args:
            expected: checksum by name of the tensors that were sent; empty: none can be compared.
            version: what every token must carry.
            how: the step and the way the weights took, for the error.

        Raises:
            SyncError: it does not.
        """
        if expected and (wrong := self.policy.differing(expected)):
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise SyncError(f"{how}: {wrong[0]!r}{more} did not arrive in the engine: its checksum differs.")
        first = self.limit is None
        completions = self.canaries.complete(self.policy, FIRST if first else TOKENS)
        if served := {int(v) for c in completions for v in c.versions} - {version}:
            raise SyncError(f"{how}: the engine samples with version {min(served)} of the weights, not {version}.")
        gap = self.canaries.gap(self.learner, completions)
        limit = ABSURD if self.limit is None else self.limit
        if not gap <= limit:
            raise SyncError(
                f"{how}: engine and learner disagree by {gap:.1e} nats on a token, more than {limit:g}: the engine "
                "computes with something else than the learner's weights (a stale cache or copy, a lower precision?)."
            )
        if first:
            self.limit = max(LEAST, MARGIN * gap)
        return gap


def _row(context: Ids, completion: Completion) -> Row:
    """A context and what was sampled after it, as a training row."""
    tokens = np.concatenate([context, completion.tokens]).astype(np.int32)
    trained = np.arange(len(tokens)) >= len(context)
    logprobs = np.concatenate([np.zeros(len(context), np.float32), completion.logprobs])
    versions = np.where(trained, completion.version, -1).astype(np.int32)
    return Row(tokens, trained, logprobs, versions, np.where(trained, 0, -1).astype(np.int32))
