"""What is looked at in a group that somebody else has played, before a step trains on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from llm_gym.core import Episode, Trajectory
from llm_gym.serving.leases import Lease

CERTAIN = 1e-4
"""Nats by which a log-probability may be above 0, for rounding."""


def wrong_with(lease: Lease, episodes: Sequence[Episode], *, name: str, version: int, vocabulary: int) -> str | None:
    """The first thing that is wrong with a group, in a sentence; None: nothing.

    Args:
        lease: what was to be played.
        episodes: what was.
        name: what episodes call the environment.
        version: of the weights now.
        vocabulary: ids that there are.
    """
    task, size = lease.offer.task, lease.offer.how["group_size"]
    if len(episodes) != size:
        return f"The group has {len(episodes)} episodes, want {size}."
    for member, episode in enumerate(episodes):
        where = f"Episode {member}"
        got, want = (
            (episode.env_id, episode.seed, episode.task, episode.member),
            (name, task.seed, task.row, member),
        )
        if got != want:
            return f"{where} is of (environment, seed, row, member) {got}, want {want}."
        if not (isinstance(episode.seconds, float | int) and math.isfinite(episode.seconds)):
            return f"{where} took {episode.seconds!r:.40} seconds, want a finite number."
        for message in episode.messages:
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
                return f"{where} has {message!r:.60} among its messages, want objects with a role."
        values = [*episode.rewards.values(), *(span.reward for _, span in episode.spans)]
        if not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
            return f"{where} has a reward that is no finite number."
        heats = {span.temperature for _, span in episode.spans} - {lease.offer.how["sampling"].temperature}
        if heats:
            return f"{where} was sampled at temperature {min(heats)}, want {lease.offer.how['sampling'].temperature}."
        for number, trajectory in enumerate(episode.trajectories):
            wrong = _wrong(trajectory, number, episode, (lease.version, version), vocabulary)
            if wrong:
                return f"{where}, trajectory {number}: {wrong}."
        turns = [span.turn for _, span in episode.spans]
        if turns != list(range(len(turns))):
            return f"{where} has turns {turns}, want each number once."
    return None


def _wrong(
    trajectory: Trajectory, number: int, episode: Episode, versions: tuple[int, int], vocabulary: int
) -> str | None:
    tokens, spans = trajectory.tokens, trajectory.spans
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocabulary):
        return f"token ids from {tokens.min()} to {tokens.max()}, want 0 to {vocabulary - 1}"
    if trajectory.parent is not None:
        parent, length = trajectory.parent
        if not (0 <= parent < number and 0 < length <= len(episode.sequence(parent))):
            return f"parent {trajectory.parent}, which is no beginning of an earlier trajectory"
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), len(tokens)]
    if edges != sorted(edges) or any(span.start == span.stop for span in spans):
        return f"spans {[(s.start, s.stop) for s in spans]} of {len(tokens)} tokens, want them in order and not empty"
    if spans and spans[0].start == 0 and trajectory.parent is None:
        return "its first token is sampled, and nothing stands before it"
    sampled = sum(span.stop - span.start for span in spans)
    for name, stream in trajectory.streams.items():
        if len(stream) != sampled:
            return f"{len(stream)} values of {name!r} for {sampled} sampled tokens"
    logprobs = trajectory.streams.get("logprobs")
    if logprobs is None or not (np.isfinite(logprobs).all() and (logprobs <= CERTAIN).all()):
        return "a log-probability that is missing, no finite number or above 0"
    for span in spans:
        first, last = int(span.versions.min()), int(span.versions.max())
        if not (versions[0] <= first and last <= versions[1]):
            return f"tokens of versions {first} to {last}, want {versions[0]} to {versions[1]}"
    return None
