"""The nouns that travel: what a policy returns, what an episode was, what the trainer reads.

Everything here is immutable, and everything downstream (advantages, packing, reports, replay)
derives from an `Episode`. Nothing is ever re-tokenised: the ids in a `Trajectory` are the ids that the
engine read and sampled, each of them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from numbers import Real
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
    BAD_REPLY = "bad_reply"
    """The scorer could make nothing of the reply, by the reply's own fault: it scores 0 (`errors.BadReply`)."""
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
        return self in (StopReason.ANSWERED, StopReason.BAD_REPLY)

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
        for name, holds, want in _BOUNDS:
            value = getattr(self, name)
            if not (isinstance(value, Real) and holds(value)):
                raise ValueError(f"sampling.{name}: got {value!r}, want a value {want}.")
        if min(self.stop_token_ids or (0,)) < 0:
            raise ValueError(f"sampling.stop_token_ids: got {self.stop_token_ids!r}, want ids, which are >= 0.")

    @property
    def full_support(self) -> bool:
        """Whether every token can be drawn, so that its log-probability is the plain softmax's."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0


_BOUNDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda value: 0 <= value < math.inf, "in [0, inf)"),
    ("max_tokens", lambda value: value >= 1, ">= 1"),
    ("top_k", lambda value: value >= 0, ">= 0 (0 keeps every token)"),
    ("top_p", lambda value: 0 < value <= 1, "in (0, 1]"),
    ("min_p", lambda value: 0 <= value <= 1, "in [0, 1]"),
)


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
        return _versions(len(self.tokens), self.version, self.updates)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of a trajectory that the policy sampled: one completion."""

    start: int
    """Where it begins among the trajectory's own tokens."""
    stop: int
    """Where it ends."""
    turn: int
    """Its place among the completions of the episode, from 0."""
    reward: float = 0.0
    """Weighted reward of the step that it was."""
    finish_reason: FinishReason = "stop"
    """As in `Completion`."""
    version: int = 0
    """As in `Completion`."""
    updates: tuple[tuple[int, int], ...] = ()
    """As in `Completion`; indices count from the span's first token."""
    temperature: float = 1.0
    """What the logits were divided by; 0: greedy."""
    trained: bool = True
    """Whether a step may train it."""

    @property
    def versions(self) -> Ids:
        """Version of the weights that sampled each token, int32 [n]."""
        return _versions(self.stop - self.start, self.version, self.updates)


def _versions(count: int, first: int, updates: Iterable[tuple[int, int]]) -> Ids:
    versions = np.full(count, first, np.int32)
    for start, version in updates:
        versions[start:] = version
    return versions


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One uninterrupted sequence of tokens; an episode has one, unless its history was rewritten or branched."""

    tokens: Ids
    """Its own ids, int32 [n]: contexts and completions in turn, the last of which ends it."""
    spans: tuple[Span, ...]
    """What was sampled, in order; they do not overlap."""
    streams: Mapping[str, npt.NDArray[np.float32]]
    """What is known of each sampled token, float32 [m] each, m tokens in all spans. `logprobs`: the sampler's."""
    parent: tuple[int, int] | None = None
    """(number of an earlier trajectory of the episode, tokens of it) that it goes on from; None: from nothing."""
    agent: str = ""
    """Who speaks; empty where there is one only."""

    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        """The sampler's log-probabilities (nats), float32 [m]."""
        return self.streams["logprobs"]

    @property
    def sampled(self) -> npt.NDArray[np.int64]:
        """Where among its own tokens the sampled ones stand, int64 [m]."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.spans] or [np.empty(0, np.int64)])

    def of_tokens(self, name: str) -> npt.NDArray[Any]:
        """A field of the spans for each sampled token, [m]."""
        return np.repeat([getattr(s, name) for s in self.spans], [s.stop - s.start for s in self.spans])


@dataclass(frozen=True, slots=True)
class Turn:
    """A view of one exchange: the whole context shown, the completion sampled, the reward it earned."""

    prompt: Ids
    """The whole context, int32 [p]; it extends the previous turn's unless history was rewritten."""
    completion: Completion
    reward: float = 0.0
    """Weighted reward of this step."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished episode, however it finished."""

    env_id: str
    """The environment's id, or the name it was given in a mixture."""
    seed: int
    """The reset seed; episodes of one group share it."""
    trajectories: tuple[Trajectory, ...]
    """Every token shown and sampled, once."""
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
    rank: int = 0
    """The process of its run that played it. That one alone holds its tokens, and trains on them."""

    @property
    def reward(self) -> float:
        """The episode's return: the sum of its turns' weighted rewards."""
        return float(sum(span.reward for _, span in self.spans))

    @property
    def tokens_generated(self) -> int:
        """Sampled tokens."""
        return sum(span.stop - span.start for _, span in self.spans)

    @property
    def whole(self) -> bool:
        """Whether its tokens are here; the others know an `outline` of it."""
        return all(len(each.tokens) >= each.spans[-1].stop for each in self.trajectories if each.spans)

    def outline(self) -> Episode:
        """What processes tell each other of an episode: lengths, rewards, versions and its end, but no token.

        Of its messages only how the answers of tools begin, which says whether they are errors.
        """
        answers = (str(m.get("content"))[:8] for m in self.messages if m.get("role") == "tool")
        nothing: dict[str, Any] = {"tokens": np.empty(0, np.int32), "streams": {}}
        return replace(
            self,
            trajectories=tuple(replace(each, **nothing) for each in self.trajectories),
            messages=tuple({"role": "tool", "content": text} for text in answers),
        )

    @property
    def spans(self) -> list[tuple[int, Span]]:
        """(number of its trajectory, span) of every completion, in the order of turns."""
        found = [(i, span) for i, trajectory in enumerate(self.trajectories) for span in trajectory.spans]
        return sorted(found, key=lambda pair: pair[1].turn)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The exchanges in order; arrays are views into the trajectories where nothing was branched."""
        return tuple(self._turn(i, span) for i, span in self.spans)

    def sequence(self, number: int) -> Ids:
        """All tokens of a trajectory, those before its branch included, int32 [n]."""
        own = self.trajectories[number]
        if own.parent is None:
            return own.tokens
        parent, length = own.parent
        return np.concatenate([self.sequence(parent)[:length], own.tokens])

    def _turn(self, number: int, span: Span) -> Turn:
        own = self.trajectories[number]
        before = own.parent[1] if own.parent else 0
        at = sum(s.stop - s.start for s in own.spans if s.start < span.start)
        logprobs = own.logprobs[at : at + span.stop - span.start]
        said = Completion(own.tokens[span.start : span.stop], logprobs, span.finish_reason, span.version, span.updates)
        return Turn(self.sequence(number)[: before + span.start], said, span.reward)


@dataclass(frozen=True, slots=True)
class Task:
    """What one group plays."""

    env: int
    """Which environment of the run, from 0."""
    seed: int
    """The reset seed, below 2**32."""
    row: int | None = None
    """The row of the environment's data; None: the seed decides."""


@dataclass(frozen=True, slots=True)
class Group:
    """The episodes of one task, whole: failed ones are in it too."""

    task: Task
    episodes: tuple[Episode, ...]
    filtered: str | None = None
    """The filter that left it out; None: it may be trained on."""

    @property
    def seed(self) -> int:
        """The reset seed that its episodes share."""
        return self.task.seed

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """Returns, float64 [G]; NaN where the episode failed for no fault of the policy."""
        return np.array([np.nan if e.stop_reason.failed else e.reward for e in self.episodes], np.float64)


def group(episodes: Iterable[Episode], size: int) -> list[Group]:
    """Cuts episodes in driver order (seed-major) into groups of `size`; for episodes of one environment.

    Raises:
        ValueError: a group is incomplete or mixes seeds.
    """
    every = list(episodes)
    groups = [Group(Task(0, e.seed, e.task), tuple(every[i : i + size])) for i, e in enumerate(every) if i % size == 0]
    for g in groups:
        if len(g.episodes) != size or any(e.seed != g.seed for e in g.episodes):
            raise ValueError(f"group: want {size} episodes of seed {g.seed}, got seeds {[e.seed for e in g.episodes]}.")
    return groups


def is_prefix(prefix: Sequence[int] | Ids, tokens: Sequence[int] | Ids) -> bool:
    """Whether `tokens` begins with `prefix`."""
    return len(prefix) <= len(tokens) and np.array_equal(prefix, tokens[: len(prefix)])


def common_prefix(a: Ids, b: Ids) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    unlike = a[:n] != b[:n]
    return int(unlike.argmax()) if unlike.any() else n
