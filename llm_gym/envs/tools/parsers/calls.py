"""What a reply holds besides text: tool calls, and thinking in which no call counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]
"""Tool name -> JSON schema of its arguments."""
MOST_CALLS = 64
"""Calls read from one reply; what follows them is left as text. It keeps reading linear in the reply's length."""

THINKING = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "[THINK]": "[/THINK]",
    "<|channel>": "<channel|>",
}
"""Tags between which a model thinks, opening and closing."""
_TAG = re.compile("|".join(map(re.escape, [*THINKING, *THINKING.values()])))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call as it stands in a reply."""

    name: str
    """The tool's name as it was written; empty if it cannot be made out."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Argument name -> JSON value."""
    start: int = 0
    """Where the call's markup starts in the reply's text."""
    stop: int = 0
    """Where it ends."""
    error: str = ""
    """Why the call cannot be read, in words for the model; empty if it can."""
    id: str = ""
    """The call's id, in the formats that write one."""


def open_thinking(prompt: str) -> str:
    """The tag that closes the thinking which the end of a prompt opens (`<think>`), or nothing."""
    tail = prompt.rstrip()
    return next((closing for opening, closing in THINKING.items() if tail.endswith(opening)), "")


def without_thinking(text: str, closing: str = "") -> str:
    """`text` with all thinking turned into spaces, so that places in it stay where they are.

    Args:
        text: a reply.
        closing: the tag that ends the thinking it starts in, if the prompt opened one.

    Thinking that is never closed reaches to the end. A closing tag alone is ordinary text.
    """
    kept, at = [], 0
    for start, stop in thinking(text, closing):
        kept += [text[at:start], " " * (stop - start)]
        at = stop
    return "".join([*kept, text[at:]])


def thinking(text: str, closing: str = "") -> list[tuple[int, int]]:
    """Where a reply thinks: (start, stop) of each stretch, its tags included; the arguments of `without_thinking`."""
    found: list[tuple[int, int]] = []
    at = 0
    for tag in _TAG.finditer(text):
        if closing:
            if tag[0] == closing:
                found.append((at, tag.end()))
                closing = ""
        elif tag[0] in THINKING:
            at, closing = tag.start(), THINKING[tag[0]]
    return [*found, (at, len(text))] if closing else found


def without_calls(text: str, calls: Sequence[ToolCall]) -> str:
    """`text` without the markup of the calls that could be read."""
    kept, at = [], 0
    for call in sorted((c for c in calls if not c.error), key=lambda c: c.start):
        kept.append(text[at : max(at, call.start)])
        at = max(at, call.stop)
    return "".join([*kept, text[at:]]).strip()
