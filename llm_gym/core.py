"""The nouns that travel: what a policy returns, what an episode was, what the trainer reads.

Everything here is immutable, and everything downstream (advantages, packing, reports, replay)
derives from this ledger. Nothing is ever re-tokenised: the ids in a `Turn` are the ids that the
engine read and sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Message = dict[str, Any]
"""One chat message in the usual form: `{"role": ..., "content": ...}`, tool fields included."""
Messages = list[Message]
Ids = npt.NDArray[np.int32]
"""Token ids, int32, shape [n]."""


class StopReason(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"
    """The environment was finished: an answer was graded, a game won or lost."""
    TURN_LIMIT = "turn_limit"
    """`max_turns` completions were used up."""
    TOKEN_LIMIT = "token_limit"
    """A completion was cut by length, or the context is full."""
    TIME_LIMIT = "time_limit"
    """The episode's wall-clock budget ran out."""
    TOOL_FAILURE = "tool_failure"
    """A tool broke in a way that is not the policy's doing (a dead server, a lost sandbox)."""
    ENV_ERROR = "env_error"
    """The environment raised."""
    REWARD_ERROR = "reward_error"
    """A reward function raised, or gave something that is no reward."""
    POLICY_ERROR = "policy_error"
    """The engine failed for this episode."""
    CANCELLED = "cancelled"
    """The run was stopped while the episode was under way."""

    @property
    def terminated(self) -> bool:
        """Whether the task itself ended (Gymnasium's `terminated`; every other end is `truncated`)."""
        return self is StopReason.ANSWERED

    @property
    def failed(self) -> bool:
        """Whether the end says nothing about the policy: such an episode is recorded, never trained on."""
        return self in _FAILED


_FAILED = frozenset(
    {
        StopReason.TOOL_FAILURE,
        StopReason.ENV_ERROR,
        StopReason.REWARD_ERROR,
        StopReason.POLICY_ERROR,
        StopReason.CANCELLED,
    }
)

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a completion."""

    temperature: float = 1.0
    """Divides the logits; 0 means greedy."""
    max_tokens: int = 256
    """Most tokens in one completion."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches p."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest one."""
    stop_token_ids: tuple[int, ...] | None = None
    """Ids that end a completion (and stay in it); None: the model's own."""

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("temperature", 0 <= self.temperature < math.inf, "in [0, inf)"),
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("top_k", self.top_k >= 0, ">= 0 (0 keeps every token)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"sampling.{name}: got {getattr(self, name)!r}, want a value {want}.")

    @property
    def full_support(self) -> bool:
        """Whether every token can be drawn, so that its log-probability is the plain softmax's."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy returns for one context."""

    tokens: Ids
    """The sampled ids, int32 [n], the stop token included."""
    logprobs: npt.NDArray[np.float32]
    """Log-probability (nats) of each under the distribution it was drawn from, float32 [n]."""
    finish_reason: FinishReason
    """`stop` (a stop token was drawn), `length` (cut) or `abort`."""
    version: int = 0
    """Version of the weights that sampled its first token."""
    updates: tuple[tuple[int, int], ...] = ()
    """(index of the first token, version) of every weight update that arrived while it was being sampled."""

    @property
    def versions(self) -> Ids:
        """Version of the weights that sampled each token, int32 [n]."""
        versions = np.full(len(self.tokens), self.version, np.int32)
        for start, version in self.updates:
            versions[start:] = version
        return versions


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: the whole context shown, the completion sampled, the reward it earned."""

    prompt: Ids
    """The whole context, int32 [p]; it extends the previous turn's unless history was rewritten."""
    completion: Completion
    reward: float
    """Weighted reward of this step."""


@dataclass(frozen=True, slots=True)
class Row:
    """A training row: one uninterrupted token sequence of an episode, per-token streams of length n."""

    tokens: Ids
    """Ids, int32 [n]."""
    trained: npt.NDArray[np.bool_]
    """True where the policy sampled the token, bool [n]; prompts and tool results are False."""
    logprobs: npt.NDArray[np.float32]
    """The sampler's log-probabilities, float32 [n]; 0 where not trained."""
    versions: npt.NDArray[np.int32]
    """Version of the weights that sampled the token, int32 [n]; -1 where not trained."""
    turns: npt.NDArray[np.int32]
    """Index of the turn that sampled the token, int32 [n]; -1 where not trained."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished episode, however it finished."""

    env_id: str
    """The environment's id, or the name it was given in a mixture."""
    seed: int
    """The reset seed; episodes of one group share it."""
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Reward components by name, summed over the episode, before weighting."""
    messages: tuple[Message, ...] = ()
    """The chat as the environment saw it."""
    member: int = 0
    """Index within its group."""
    error: str | None = None
    """What was raised, if anything was."""
    seconds: float = 0.0
    """Wall time from reset to end."""
    task: int | None = None
    """The row of the environment's data that was asked for; None: the seed decided."""

    @property
    def reward(self) -> float:
        """The episode's return: the sum of its turns' weighted rewards."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def tokens_generated(self) -> int:
        """Sampled tokens."""
        return sum(len(turn.completion.tokens) for turn in self.turns)

    def rows(self) -> list[Row]:
        """The episode as training rows: one, unless the environment rewrote its history."""
        rows: list[list[tuple[int, Turn]]] = []
        known = np.empty(0, np.int32)
        for index, turn in enumerate(self.turns):
            if not rows or not is_prefix(known, turn.prompt):
                rows.append([])
            rows[-1].append((index, turn))
            known = np.concatenate([turn.prompt, turn.completion.tokens])
        return [_merge(turns) for turns in rows]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; `from_dict` gives back an equal episode, float32 values bit for bit."""
        return {
            "env_id": self.env_id,
            "seed": self.seed,
            "member": self.member,
            "task": self.task,
            "reward": self.reward,
            "rewards": dict(self.rewards),
            "stop_reason": str(self.stop_reason),
            "error": self.error,
            "seconds": self.seconds,
            "messages": list(self.messages),
            "turns": [
                {
                    "prompt": turn.prompt.tolist(),
                    "tokens": turn.completion.tokens.tolist(),
                    "logprobs": turn.completion.logprobs.tolist(),
                    "finish_reason": turn.completion.finish_reason,
                    "version": turn.completion.version,
                    "updates": [list(update) for update in turn.completion.updates],
                    "reward": turn.reward,
                }
                for turn in self.turns
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Episode:
        """The inverse of `to_dict`."""
        turns = tuple(
            Turn(
                np.asarray(turn["prompt"], np.int32),
                Completion(
                    np.asarray(turn["tokens"], np.int32),
                    np.asarray(turn["logprobs"], np.float32),
                    turn["finish_reason"],
                    turn["version"],
                    tuple((start, version) for start, version in turn.get("updates", ())),
                ),
                turn["reward"],
            )
            for turn in data["turns"]
        )
        return cls(
            data["env_id"],
            data["seed"],
            turns,
            StopReason(data["stop_reason"]),
            data["rewards"],
            tuple(data["messages"]),
            data["member"],
            data["error"],
            data["seconds"],
            data.get("task"),
        )


@dataclass(frozen=True, slots=True)
class Group:
    """The episodes of one task (one seed), whole: failed ones are in it too."""

    seed: int
    episodes: tuple[Episode, ...]

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """Returns, float64 [G]; NaN where the episode failed for no fault of the policy."""
        return np.array([np.nan if e.stop_reason.failed else e.reward for e in self.episodes], np.float64)


def group(episodes: Iterable[Episode], size: int) -> list[Group]:
    """Cuts episodes in driver order (seed-major) into groups of `size`.

    Raises:
        ValueError: a group is incomplete or mixes seeds.
    """
    every = list(episodes)
    groups = [Group(every[i].seed, tuple(every[i : i + size])) for i in range(0, len(every), size)]
    for g in groups:
        if len(g.episodes) != size or any(e.seed != g.seed for e in g.episodes):
            raise ValueError(f"group: want {size} episodes of seed {g.seed}, got seeds {[e.seed for e in g.episodes]}.")
    return groups


def is_prefix(prefix: Sequence[int] | Ids, tokens: Sequence[int] | Ids) -> bool:
    """Whether `tokens` begins with `prefix`."""
    return len(prefix) <= len(tokens) and np.array_equal(prefix, tokens[: len(prefix)])


def _merge(turns: list[tuple[int, Turn]]) -> Row:
    """Turns whose contexts extend one another, as one row."""
    last = turns[-1][1]
    tokens = np.concatenate([last.prompt, last.completion.tokens]).astype(np.int32)
    trained = np.zeros(len(tokens), np.bool_)
    logprobs = np.zeros(len(tokens), np.float32)
    versions = np.full(len(tokens), -1, np.int32)
    of_turn = np.full(len(tokens), -1, np.int32)
    for index, turn in turns:
        span = slice(len(turn.prompt), len(turn.prompt) + len(turn.completion.tokens))
        trained[span], logprobs[span] = True, turn.completion.logprobs
        versions[span], of_turn[span] = turn.completion.versions, index
    return Row(tokens, trained, logprobs, versions, of_turn)
