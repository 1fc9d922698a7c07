"""The proof that the learner's weights arrived in the sampler: versions, checksums, canaries.

Weights can fail to arrive without any error: a tied head kept in a packed copy, a prefix cache made with the
old weights, one tensor missed by name. Training then goes on, off-policy by nats, and merely learns badly.
So after every synchronisation three things are looked at:

1. a checksum of every tensor that was sent, where the engine can compute them (it names those that differ);
2. canaries: the engine samples a few tokens after fixed contexts, and the learner computes their
   log-probabilities again. Checksums see every weight; canaries see what acts: caches, packed copies, kernels;
3. the version that those tokens carry.

How far canaries may lie apart is a matter of rounding, which differs from model to model and from step to step. So the
engine is compared with the learner computed in float32, whatever it trains in, from weights rounded as the engine
holds them:

- An engine that computes in float32 must agree to `EXACT` on every token (vLLM: 6e-6 nats over 4,096 tokens).
- A coarser one (bfloat16; adapters over a coarse base) rounds at every operation. The learner measures what such
  rounding does to its own log-probabilities of the same tokens (see `rounding`): r nats on average. The engine's mean
  gap may be `MARGIN` times r. (The gap of one token has a long tail, the mean of many has not.)
- A small update that is missing altogether lies below that. But the engine samples after the same contexts with the
  same seeds every time, so most tokens are those of the last time, and their log-probabilities must have moved as the
  learner's have: by half as much at least, as soon as those have moved by `VISIBLE` times r since it was last looked
  at. Rounding has no sign in common with that movement, so its part of the sum vanishes.
- Where the engine's weights are rounded as the learner's cannot be (adapters folded in, a learner that is split), small
  updates are lost together, which looks as if they were stale: `BLURRED` times the limit, and no look at movement.
- How a quantised engine rounds only a measurement tells: its ratio when the run starts widens the limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_gym.core import Completion, Ids, Sampling
from llm_gym.errors import SyncError
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.rounding import rounding, unit
from llm_gym.harness.types import Floats, MicroBatch, TrainSequence
from llm_gym.policies import Policy

EXACT = 1e-3
"""Largest gap (nats) on a token between an engine and a learner that both compute in float32."""
MARGIN = 6.0
"""Others: how many times the learner's own rounding the mean gap may be."""
LEAST = 0.01
"""Others: the limit of the mean gap is never below this (nats)."""
ABSURD = 1.0
"""A mean gap (nats) that no rounding and no quantisation explains; a run does not start with it."""
VISIBLE = 4.0
"""How many times its own rounding the learner must have moved before the engine must have moved along."""
ENOUGH = 16
"""Least number of tokens that say whether it has; a larger change leaves fewer as they were, and shows in the gap."""
BLURRED = 3.0
"""How much wider the limit is where what the engine's type does to its weights is not known."""
DRAWS = 2
"""How often rounding is simulated."""

CONTEXT = 72
"""Tokens of a context: two blocks of a prefix cache, and some."""
FEW, MANY = (2, 2), (4, 16)
"""Contexts, and tokens sampled after each, where agreement is exact, and where it is a matter of averages. The first
token comes from the prefill, the others from decoding steps."""


@dataclass(frozen=True, slots=True)
class ProbePrompts:
    """Fixed contexts, and how completions of them are drawn."""

    contexts: tuple[Ids, ...]
    temperature: float
    """The run's: engine and learner must agree on the distribution that is trained."""

    tokens: int
    """How many are sampled after each."""

    @classmethod
    def of(cls, vocabulary: int, room: int, temperature: float, *, exact: bool = True) -> ProbePrompts:
        """Random contexts, always the same ones.

        Args:
            vocabulary: ids are drawn below it.
            room: the engine's longest context; canaries take no more than half of it.
            temperature: the run's.
            exact: whether engine and learner must agree on every token; else there are more of them.
        """
        count, tokens = FEW if exact else MANY
        length = max(1, min(CONTEXT, room // 2))
        ids = np.random.default_rng(0).integers(0, vocabulary, (count, length)).astype(np.int32)
        return cls(tuple(ids), temperature, min(tokens, max(1, room - length)))

    def complete(self, policy: Policy) -> list[Completion]:
        """What the engine samples after each context; the same seeds every time."""
        sampling = Sampling(temperature=self.temperature, max_tokens=self.tokens, stop_token_ids=())
        return policy.generate(self.contexts, sampling, seeds=range(len(self.contexts)))

    def batch(self, completions: Iterable[Completion]) -> MicroBatch:
        """The contexts and what was sampled after them, in order, for the learner."""
        pairs = zip(self.contexts, completions, strict=True)
        rows = [_sequence(context, completion, i) for i, (context, completion) in enumerate(pairs)]
        (batch,) = pack(rows, max_tokens=1 << 30).micro
        return batch


class Reading(NamedTuple):
    """Log-probabilities (nats) of the canaries' tokens, [P, T] each."""

    tokens: Ids
    engine: Floats
    learner: Floats
    """In float32, from weights rounded as the engine's are."""

    @property
    def gaps(self) -> Floats:
        """|engine - learner|; infinite where one is no number."""
        apart = np.abs(self.engine - self.learner)
        return np.where(np.isfinite(apart), apart, np.inf)

    def moved(self, before: Reading) -> tuple[Floats, Floats]:
        """How far engine and learner have moved since, on the tokens that are the same up to there, [n] each."""
        same = np.logical_and.accumulate(self.tokens == before.tokens, axis=1)
        return (self.engine - before.engine)[same], (self.learner - before.learner)[same]


class Found(NamedTuple):
    """What a proof found."""

    worst: float
    """Largest gap (nats) on a token."""
    share: float
    """What was judged, as a share of its limit."""


class WeightSyncCheck:
    """Compares what an engine serves with the learner, again and again.

    Args:
        learner: what the weights should be.
        policy: what they should have arrived in.
        coarse: the type that rounds, if engine or frozen weights are coarser than float32; None: neither is.
        held: the type of the engine's weights, where they are the learner's, each rounded to it.
        blurred: whether the engine's weights are rounded in another way.
        quantised: whether the engine rounds as no type does.
        limit: the largest gap (nats) on a token that is no error, if somebody chose it; None: see the module's text.
    """

    def __init__(
        self,
        learner: Learner,
        policy: Any,
        canaries: ProbePrompts,
        *,
        coarse: torch.dtype | None = None,
        held: torch.dtype = torch.float32,
        blurred: bool = False,
        quantised: bool = False,
        limit: float | None = None,
    ) -> None:
        self.learner, self.policy, self.canaries = learner, policy, canaries
        self.coarse, self.held, self.limit = coarse, held, limit
        self._width = None if quantised else BLURRED if blurred else 1.0
        self._follows = coarse is not None and limit is None and not (blurred or quantised)
        self._before: Reading | None = None

    def __call__(self, expected: Mapping[str, int], *, version: int, how: str) -> Found:
        """Returns how far engine and learner are apart, if the engine serves the learner's weights as `version`.

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
        completions = self.canaries.complete(self.policy)
        if served := {int(v) for c in completions for v in c.versions} - {version}:
            raise SyncError(f"{how}: the engine samples with version {min(served)} of the weights, not {version}.")
        batch = self.canaries.batch(completions)
        now = self._read(batch)
        if self.coarse is None or self.limit is not None:
            gap, limit, what = float(now.gaps.max()), self.limit or EXACT, "a token"
        else:
            own = self._own(batch, now)
            gap, limit, what = float(now.gaps.mean()), self._allowed(own, now), "the average token"
        if not gap <= limit:
            raise SyncError(
                f"{how}: engine and learner disagree by {gap:.1e} nats on {what}, more than {limit:.2g}: the engine "
                "computes with something else than the learner's weights (a stale cache or copy, a lower precision?)."
            )
        if self._follows:
            self._follow(now, VISIBLE * own, how)
        return Found(float(now.gaps.max()), gap / limit)

    def _read(self, batch: MicroBatch) -> Reading:
        """The engine's log-probabilities, which the batch carries, and the learner's own."""
        shape = (len(self.canaries.contexts), -1)
        ours = self._learners(batch)
        return Reading(
            batch.streams["target"].cpu().numpy().reshape(shape),
            batch.streams["old_logprobs"].double().cpu().numpy().reshape(shape),
            ours.reshape(shape),
        )

    def _learners(self, batch: MicroBatch) -> Floats:
        found, _ = self.learner.logprobs(batch, temperature=self.canaries.temperature, entropy=False, held=self.held)
        values: Floats = found.double().cpu().numpy()
        return values

    def _own(self, batch: MicroBatch, now: Reading) -> float:
        """How far rounding moves the learner's log-probabilities (nats), on average."""
        assert self.coarse is not None
        moved = []
        for seed in range(DRAWS):
            with rounding(self.learner.backbone.causal, unit(self.coarse), seed):
                moved.append(np.abs(self._learners(batch) - now.learner.reshape(-1)))
        return float(np.mean(moved))

    def _allowed(self, own: float, now: Reading) -> float:
        """The largest mean gap (nats) that rounding explains, if the learner's own is `own`."""
        if self._width is None:
            gap = float(now.gaps.mean())
            if not gap <= ABSURD:
                return ABSURD
            self._width = max(1.0, gap / max(own, LEAST / MARGIN))
        return max(LEAST, MARGIN * own) * self._width

    def _follow(self, now: Reading, visible: float, how: str) -> None:
        """Looks whether the engine has moved with the learner since the last time that could be told."""
        before = self._before
        if before is None:
            self._before = now
            return
        engine, learner = now.moved(before)
        few = len(learner) < ENOUGH
        if not few and np.abs(learner).mean() < visible:
            return  # rounding hides it; it adds up until it is seen
        self._before = now
        followed = 1.0 if few else float((engine * np.sign(learner)).sum() / np.abs(learner).sum())
        if not followed >= 0.5:
            raise SyncError(
                f"{how}: the learner's log-probabilities moved by {np.abs(learner).mean():.1e} nats on average, and "
                f"the engine's followed by {followed:.0%} of it: a part of the update did not arrive, or does not act "
                "(a stale cache or copy?)."
            )


def _sequence(context: Ids, completion: Completion, number: int) -> TrainSequence:
    """A context and what was sampled after it."""
    tokens = np.concatenate([context, completion.tokens]).astype(np.int32)
    sampled = np.arange(len(context), len(tokens))
    return TrainSequence(tokens, sampled, {"old_logprobs": completion.logprobs}, number)
