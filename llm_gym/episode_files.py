"""Episodes as JSON: messages readable, arrays in base64; one object a line makes an episode file.

Format 2 holds trajectories: `tokens` (int32) and each stream (float32) as base64 of little-endian values, spans as
objects. Files without a format number are of version 0.1: turns, each with its whole context as a list; they are read.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_gym.core import Completion, Episode, Span, StopReason, Trajectory, Turn
from llm_gym.trajectories import trajectories

FORMAT = 2


def encode(episode: Episode) -> dict[str, Any]:
    """A JSON-ready form; `decode` gives back an equal episode, bit for bit."""
    return {
        "format": FORMAT,
        "env_id": episode.env_id,
        "seed": episode.seed,
        "member": episode.member,
        "task": episode.task,
        "rank": episode.rank,
        "reward": episode.reward,
        "rewards": dict(episode.rewards),
        "stop_reason": str(episode.stop_reason),
        "error": episode.error,
        "seconds": episode.seconds,
        "messages": list(episode.messages),
        "trajectories": [_encode(trajectory) for trajectory in episode.trajectories],
    }


def decode(record: Mapping[str, Any]) -> Episode:
    """The inverse of `encode`; also for records of version 0.1.

    Raises:
        ValueError: a format that this version does not know, or a record that is no episode.
    """
    if (number := record.get("format", 1)) not in (1, FORMAT):
        raise ValueError(f"format: got {number!r}, but this version reads 1 and {FORMAT}")
    found = (
        trajectories(_turn(turn) for turn in record["turns"])
        if number == 1
        else tuple(_decode(each) for each in record["trajectories"])
    )
    return Episode(
        record["env_id"],
        record["seed"],
        found,
        StopReason(record["stop_reason"]),
        record["rewards"],
        tuple(record["messages"]),
        record["member"],
        record["error"],
        record["seconds"],
        record.get("task"),
        record.get("rank", 0),
    )


def _encode(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "agent": trajectory.agent,
        "parent": trajectory.parent,
        "tokens": _text(trajectory.tokens, "<i4"),
        "streams": {name: _text(stream, "<f4") for name, stream in trajectory.streams.items()},
        "spans": [asdict(span) for span in trajectory.spans],
    }


def _decode(data: Mapping[str, Any]) -> Trajectory:
    return Trajectory(
        _array(data["tokens"], "<i4"),
        tuple(Span(**{**span, "updates": _pairs(span["updates"])}) for span in data["spans"]),
        {name: _array(text, "<f4") for name, text in data["streams"].items()},
        data["parent"] and tuple(data["parent"]),
        data["agent"],
    )


def _turn(data: Mapping[str, Any]) -> Turn:
    """A turn as version 0.1 wrote it."""
    tokens, logprobs = np.asarray(data["tokens"], np.int32), np.asarray(data["logprobs"], np.float32)
    said = Completion(tokens, logprobs, data["finish_reason"], data["version"], _pairs(data.get("updates", ())))
    return Turn(np.asarray(data["prompt"], np.int32), said, data["reward"])


def _pairs(updates: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(version)) for start, version in updates)


def _text(array: npt.NDArray[Any], dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")


def _array(text: str, dtype: str) -> npt.NDArray[Any]:
    """Of the machine's own byte order; it can be written to."""
    return np.frombuffer(base64.b64decode(text), dtype).astype(np.dtype(dtype).newbyteorder("="))
