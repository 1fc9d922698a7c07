"""Episodes as a page shows them: pairs before and after training, and groups along the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_gym import episode_files
from llm_gym.core import Episode, Ids
from llm_gym.harness.runs.words import short
from llm_gym.report.run import Record, Run, episodes

PAIRS = 10
"""Before/after pairs shown."""
STEPS, MEMBERS = 6, 8
"""Steps shown in the viewer, and episodes of each."""
MOST_TOKENS = 2000
"""Tokens of one episode coloured one by one; the rest is left out, and the page says so."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""

_SHADES = (0.9, 0.5, 0.1, 0.01)
"""Probabilities at which a token's shade changes."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: role, text, and tool calls as JSON."""

    role: str
    text: str
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of text of one kind: `prompt`, `environment`, or one sampled token."""

    kind: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Transcript:
    """One episode."""

    seed: int
    member: int
    reward: str
    good: float
    """Where the reward lies between the least (0) and the greatest (1) of those shown beside it."""
    stop_reason: str
    components: str
    tokens: int
    error: str
    opening: tuple[Message, ...]
    """The messages before the policy's first."""
    rest: tuple[Message, ...]
    spans: tuple[Span, ...]
    """The episode token by token, if a tokenizer was at hand."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same problem before and after."""

    before: Transcript
    after: Transcript


@dataclass(frozen=True, slots=True)
class Comparison:
    """Before against after on the same problems."""

    steps: tuple[int, int]
    counts: Mapping[str, int]
    """How many problems' rewards went up, down, or stayed."""
    pairs: list[Pair]
    system: str
    """The system prompt of the first pair; pages show it once."""


@dataclass(frozen=True, slots=True)
class Step:
    """Episodes of one training step that share a problem."""

    number: int
    seed: int
    transcripts: list[Transcript]


def compare(run: Run, decode: Decode | None = None) -> Comparison | None:
    """The first and the last evaluation, matched by seed; None if there are no two of them."""
    steps = list(run.eval_files)
    if len(steps) < 2:
        return None
    first, last = _by_problem(run.eval_files[steps[0]]), _by_problem(run.eval_files[steps[-1]])
    both = [(first[key], last[key]) for key in first if key in last]
    if not both:
        return None
    change = [_reward(b) - _reward(a) for a, b in both]
    counts = {"better": sum(c > 0 for c in change), "worse": sum(c < 0 for c in change)}
    counts["unchanged"] = len(both) - counts["better"] - counts["worse"]
    low, high = _range([e for pair in both for e in pair])
    pairs = [Pair(*(transcript(e, low, high, decode) for e in pair)) for pair in both[:PAIRS]]
    system = "\n".join(m.text for m in pairs[0].before.opening if m.role == "system")
    return Comparison((steps[0], steps[-1]), counts, pairs, system)


def along_the_way(run: Run, decode: Decode | None = None) -> list[Step]:
    """A few steps, evenly spread, first and last included: of each the group whose rewards differ most."""
    numbers = list(run.train_files)
    if len(numbers) > STEPS:
        numbers = [numbers[round(i * (len(numbers) - 1) / (STEPS - 1))] for i in range(STEPS)]
    shown = []
    for number in numbers:
        groups: dict[Any, list[Record]] = {}
        for record in episodes(run.train_files[number]):
            groups.setdefault(record.get("seed"), []).append(record)
        if groups:
            seed, group = max(groups.items(), key=lambda item: _spread(item[1]))
            low, high = _range(group)
            shown.append(Step(number, seed, [transcript(e, low, high, decode) for e in group[:MEMBERS]]))
    return shown


def transcript(record: Record, low: float, high: float, decode: Decode | None = None) -> Transcript:
    """One episode, its reward placed between `low` and `high`."""
    messages = [_message(m) for m in record.get("messages") or [] if isinstance(m, dict)]
    said = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
    reward, episode = _reward(record), episode_files.decode(record)
    return Transcript(
        seed=record.get("seed", 0),
        member=record.get("member", 0),
        reward=short(reward),
        good=min(1.0, max(0.0, (reward - low) / (high - low))) if high > low and math.isfinite(reward) else 0.5,
        stop_reason=str(record.get("stop_reason", "")),
        components=_components(record.get("rewards") or {}, reward),
        tokens=episode.tokens_generated,
        error=str(record.get("error") or ""),
        opening=tuple(messages[:said]),
        rest=tuple(messages[said:]),
        spans=tuple(_spans(episode, decode)) if decode else (),
    )


def _reward(record: Record) -> float:
    value = record.get("reward")
    return float(value) if isinstance(value, int | float) else math.nan


def _components(rewards: Mapping[str, float], total: float) -> str:
    """The reward's parts; nothing if there is only one and it is the whole."""
    if list(rewards.values()) == [total]:
        return ""
    return ", ".join(f"{name} {short(float(value))}" for name, value in rewards.items())


def _by_problem(file: Path) -> dict[tuple[Any, Any], Record]:
    return {(e.get("seed"), e.get("member", 0)): e for e in episodes(file)}


def _range(records: Sequence[Record]) -> tuple[float, float]:
    """Least and greatest reward; at least [0, 1], so that a lone 0 looks bad and a lone 1 good."""
    finite = [r for r in map(_reward, records) if math.isfinite(r)]
    return min([0.0, *finite]), max([1.0, *finite])


def _spread(group: Sequence[Record]) -> float:
    finite = [r for r in map(_reward, group) if math.isfinite(r)]
    return max(finite) - min(finite) if finite else -1.0


def _message(message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    calls = message.get("tool_calls") or ()
    return Message(
        str(message.get("role", "?")),
        "" if content is None else str(content),
        tuple(json.dumps(call.get("function", call) if isinstance(call, dict) else call) for call in calls),
    )


def _spans(episode: Episode, decode: Decode) -> list[Span]:
    """Prompt and environment text in whole stretches, sampled tokens one by one."""
    spans: list[Span] = []
    left = MOST_TOKENS
    for number, trajectory in enumerate(episode.trajectories):
        tokens = episode.sequence(number)
        before, done, logprobs = len(tokens) - len(trajectory.tokens), 0, trajectory.logprobs
        for said in trajectory.spans:
            start, stop = said.start + before, said.stop + before
            if start > done and left > 0:
                spans.append(Span("environment" if done else "prompt", decode(tokens[done:start].tolist())))
            own, logprobs = logprobs[: stop - start], logprobs[stop - start :]
            while start < stop and left > 0:
                end = _character(tokens[:stop], start, decode)
                at = start - stop + len(own)
                spans.append(_sampled(decode(tokens[start:end].tolist()), own[at : at + end - start].tolist()))
                left -= end - start
                start = end
            done = stop
    if left <= 0:
        spans.append(Span("cut", f"… only the first {MOST_TOKENS:,} sampled tokens are shown"))
    return spans


def _character(tokens: Ids, start: int, decode: Decode) -> int:
    """Where the tokens from `start` on make whole characters: a byte-level token may hold a part of one."""
    for stop in range(start + 1, min(start + 4, len(tokens)) + 1):
        if "\ufffd" not in decode(tokens[start:stop].tolist()):
            return stop
    return start + 1


def _sampled(text: str, logprobs: Sequence[float]) -> Span:
    p = math.exp(min(sum(logprobs), 0.0))
    return Span(f"p{sum(p < shade for shade in _SHADES)}", text, f"p = {short(p)}")
