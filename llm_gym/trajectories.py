"""Trajectories put together as an episode is played, or from turns that are known."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from llm_gym.core import Completion, Ids, Span, Trajectory, Turn, common_prefix, is_prefix


class TrajectoryBuilder:
    """Puts an episode's turns together as they are played; no token is held twice.

    A context that extends a trajectory goes on with it: with the longest, if it extends several. Any other begins a new
    one, as a branch of the trajectory with which it has most in common.

    >>> builder = TrajectoryBuilder()
    >>> said = Completion(np.array([7], np.int32), np.zeros(1, np.float32), "stop")
    >>> for context in ([1, 2], [1, 2, 7, 3], [1, 9]):
    ...     builder.add(np.array(context, np.int32), said)
    >>> [(t.tokens.tolist(), t.parent) for t in builder.build()]
    [([1, 2, 7, 3, 7], None), ([9, 7], (0, 1))]
    """

    def __init__(self) -> None:
        self._sequences: list[_Growing] = []
        self._parents: list[tuple[int, int] | None] = []
        self._spans: list[list[Span]] = []
        self._logprobs: list[list[npt.NDArray[np.float32]]] = []
        self.turns = 0
        """Completions so far."""

    def add(self, prompt: Ids, completion: Completion, reward: float = 0.0, *, temperature: float = 1.0) -> None:
        """One turn: the whole context int32 [p], and what was sampled after it."""
        at = self._continued(prompt)
        known = self._sequences[at]
        known.append(prompt[len(known.tokens) :])
        start = len(known.tokens) - self._before(at)
        known.append(completion.tokens)
        said = completion.finish_reason, completion.version, completion.updates
        self._spans[at].append(Span(start, start + len(completion.tokens), self.turns, reward, *said, temperature))
        self._logprobs[at].append(completion.logprobs)
        self.turns += 1

    @property
    def reward(self) -> float:
        """Of all turns so far."""
        return float(sum(span.reward for spans in self._spans for span in spans))

    def build(self) -> tuple[Trajectory, ...]:
        """The trajectories so far, in the order in which they began."""
        return tuple(
            Trajectory(
                sequence.tokens[self._before(i) :].copy(),
                tuple(self._spans[i]),
                {"logprobs": np.concatenate(self._logprobs[i])},
                self._parents[i],
            )
            for i, sequence in enumerate(self._sequences)
        )

    def _continued(self, prompt: Ids) -> int:
        """The number of the trajectory that goes on with this context; a new one, if it extends none."""
        lengths = [len(each.tokens) for each in self._sequences]
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -i)):
            if is_prefix(self._sequences[i].tokens, prompt):
                return i
        shared = [(common_prefix(known.tokens, prompt), -i) for i, known in enumerate(self._sequences)]
        length, earlier = max(shared, default=(0, 0))
        self._parents.append((-earlier, length) if length else None)
        self._sequences.append(_Growing(prompt))
        self._spans.append([])
        self._logprobs.append([])
        return len(lengths)

    def _before(self, number: int) -> int:
        """Tokens of a trajectory that are its parent's."""
        parent = self._parents[number]
        return 0 if parent is None else parent[1]


class _Growing:
    """An array of ids with room at its end: to append costs what is appended."""

    def __init__(self, tokens: Ids) -> None:
        self._room, self._used = np.array(tokens, np.int32), len(tokens)

    @property
    def tokens(self) -> Ids:
        return self._room[: self._used]

    def append(self, tokens: Ids) -> None:
        used = self._used + len(tokens)
        if used > len(self._room):
            room = np.empty(2 * used, np.int32)
            room[: self._used] = self.tokens
            self._room = room
        self._room[self._used : used] = tokens
        self._used = used


def trajectories(turns: Iterable[Turn]) -> tuple[Trajectory, ...]:
    """Turns as trajectories: of episodes that were put together otherwise than by playing."""
    builder = TrajectoryBuilder()
    for turn in turns:
        builder.add(turn.prompt, turn.completion, turn.reward)
    return builder.build()
