"""Groups as environments of Atropos send them (its atroposlib/api/README.md, ScoredData), read as groups of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llm_gym.core import Episode, Group, Sampling, Span, StopReason, Task, Trajectory
from llm_gym.errors import FAULTS, words
from llm_gym.serving.group_check import wrong_with
from llm_gym.serving.leases import Lease, Offer

COLUMNS = ("tokens", "masks", "inference_logprobs", "scores", "overrides", "messages")
NO_PLACE = ("advantages", "images", "distill_token_ids", "distill_logprobs")
"""What would change the training, and no group can hold."""


def from_scored_data(data: Mapping[str, Any], *, task: Task, env_id: str, version: int) -> Group:
    """A group that an Atropos environment has played: an episode for each sequence, a span for each trained stretch.

    Args:
        data: as JSON has it: `tokens` [G][n] ids; `masks` [G][n], the token, or -100 where it is not trained; `scores`
            [G]; `inference_logprobs` [G][n], not read where nothing is trained (there they are 1.0); `messages` and
            `overrides` [G], if any: with `set_advantage_to_zero` an episode counts in the baseline alone.
        task: what was played.
        env_id: what episodes call the environment.
        version: of the weights that sampled every token.

    Returns:
        The group. A score is the last span's reward; nothing is kept behind that. Each episode counts as answered.

    Raises:
        ValueError: it is no such group, or none that can be trained; says why in a sentence.

    >>> data = {"tokens": [[5, 6, 7]], "masks": [[-100, 6, 7]], "scores": [1.0], "inference_logprobs": [[1, -0.5, -2]]}
    >>> (episode,) = from_scored_data(data, task=Task(0, seed=3), env_id="sums", version=4).episodes
    >>> [(span.start, span.stop) for _, span in episode.spans], episode.trajectories[0].logprobs.tolist()
    ([(1, 3)], [-0.5, -2.0])
    """
    given: dict[str, Any] = {name: column for name, column in data.items() if column}  # null and [] are nothing
    if refused := [name for name in NO_PLACE if name in given]:
        raise ValueError(f"{refused[0]}: a group has no place for them (docs/seeds.md); leave them out.")
    if "inference_logprobs" not in given:
        raise ValueError("inference_logprobs: there are none, and ratios need them; Atropos' ManagedServer keeps them.")
    size = len(given["tokens"]) if isinstance(given.get("tokens"), list) else 0
    given = {"messages": [[]] * size, "overrides": [{}] * size, **given}
    if wrong := [name for name in COLUMNS if not isinstance(given.get(name), list) or len(given[name]) != size]:
        raise ValueError(f"{wrong[0]}: want a list, with a row for each of {size} sequences.")
    episodes = []
    for i, (*row, chat) in enumerate(zip(*(given[name] for name in COLUMNS), strict=True)):
        try:
            played, messages = _trajectory(version, *row), tuple(map(dict, chat))
        except FAULTS as error:  # whatever JSON may hold in place of numbers and lists
            raise ValueError(f"Sequence {i}: {words(error)}.") from error
        ended, rewards = StopReason.ANSWERED, {"score": played.spans[-1].reward}
        episodes.append(Episode(env_id, task.seed, (played,), ended, rewards, messages, i, task=task.row))
    lease = Lease("", Offer(task, {"group_size": size, "sampling": Sampling()}), "", version, math.inf)
    if unsound := wrong_with(lease, episodes, name=env_id, version=version, vocabulary=2**31):
        raise ValueError(unsound)
    return Group(task, tuple(episodes))


def _trajectory(version: int, ids: Any, mask: Any, known: Any, score: Any, override: Any) -> Trajectory:
    tokens, masks, logprobs = np.asarray(ids, np.int32), np.asarray(mask), np.asarray(known, np.float32)
    if not np.array_equal(tokens, ids) or not tokens.shape == masks.shape == logprobs.shape == (len(tokens),):
        raise ValueError("want a list of ids, one of masks and one of log-probabilities, all of one length")
    trained = masks != -100
    if not trained.any() or (masks != tokens)[trained].any():
        raise ValueError("want a mask of -100 or the token itself, and a token that is trained")
    if extra := set(override) - {"set_advantage_to_zero"}:
        raise ValueError(f"overrides: got {min(extra)!r}, want nothing but 'set_advantage_to_zero'")
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2).tolist()
    said: dict[str, Any] = {"version": version, "trained": not override.get("set_advantage_to_zero")}
    spans = [Span(start, stop, turn, **said) for turn, (start, stop) in enumerate(edges)]
    spans[-1] = replace(spans[-1], reward=float(score))
    return Trajectory(tokens[: spans[-1].stop], tuple(spans), {"logprobs": logprobs[trained]})
