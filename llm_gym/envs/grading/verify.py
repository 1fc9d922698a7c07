"""Finds the final answer in a reply and compares it exactly with the reference.

Where the answer stands is a policy, and it is explicit (`where`). `auto` follows the usual rules
of GSM8K graders: the last `#### N`; or the last `\\boxed{N}`; or the last `<answer>N</answer>`; or
the last line or sentence "Answer: N", "A: N", "the answer is N"; or else the last number. A marker
whose content is no number is no answer: it never falls back to something weaker.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from llm_gym.envs.grading.numbers import NUMBER, number, parse, plain
from llm_gym.errors import DataError, SettingError, unknown

MAX_SPAN = 300
"""An answer stands within so many characters of its phrase (and a hostile reply costs linear time)."""

Status = Literal["correct", "wrong", "no_answer"]
"""`no_answer`: the reply states none, or one that cannot be read as a number."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The outcome of grading one reply."""

    score: float
    """1 if right, else 0."""
    status: Status
    extracted: str | None
    """The answer as it was read, in canonical form; None if there was none."""
    why: str
    """One sentence for a person."""


def verify(gold: str | int | float, text: str, *, where: str = "auto") -> Grade:
    """Grades a reply against a numeric reference.

    Args:
        gold: the reference: a number, or its text (`1,234`, `$5`, `-3.5`, `1/2`).
        text: the whole reply. Thinking up to the last `</think>` is not part of the answer.
        where: `auto`, `hash` (`#### N`), `boxed`, `tag` (`<answer>`), `phrase` ("Answer: N") or `last` (number).

    Raises:
        DataError: `gold` is no number.
        SettingError: an unknown `where`.
    """
    want = _gold(gold)
    if where not in _WHERE:
        raise SettingError(unknown("where", where, _WHERE))
    stated = extract(text, where)
    if stated is None:
        return Grade(0.0, "no_answer", None, "The reply states no answer that is a number.")
    got = str(stated)
    if stated == want:
        return Grade(1.0, "correct", got, f"{got} is the reference.")
    return Grade(0.0, "wrong", got, f"{got} is not {want}.")


def extract(text: str, where: str = "auto") -> int | Fraction | None:
    """The number that `text` states as its answer under the policy `where`; None if none."""
    _, closed, answer = text.rpartition("</think>")
    if not closed and "<think>" in answer:
        return None  # the thinking was cut short: nothing was answered
    for find in _WHERE[where]:
        found, value = find(answer)
        if found:
            return value
    return None


Found = tuple[bool, int | Fraction | None]
_NOTHING: Found = (False, None)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|(-?\d[\d.,]*))")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"(?:^[ \t]*(?:[*_]*)a(?:[*_]*):|\banswer(?:\s+is\b|\s*[:=]|[*_]+\s*[:=]|\s*:?[*_]+\s*:?)\s*:?)",
    re.IGNORECASE | re.MULTILINE,
)
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"\w")
_SCALE = re.compile(r"\s*(?:hundred|thousand|million|billion|trillion)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;](?=\s+[^\W\d])")
_TERM_FOLLOWS = re.compile(r"\s*(?:[-+*/^=×÷·]|\\times|\\cdot|\bx\b)\s*[\d(\\$]")


def _hash(text: str) -> Found:
    """What follows the last `####`, on its line."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        return _NOTHING
    return True, _of_span(tail.lstrip(": \t").partition("\n")[0])


def _boxed(text: str) -> Found:
    """The content of the last box."""
    boxes = _BOXED.findall(text)
    return (True, parse(boxes[-1][0] or boxes[-1][1].rstrip(".,"))) if boxes else _NOTHING


def _tag(text: str) -> Found:
    """The content of the last answer tag; a box or a phrase inside it is opened first."""
    pairs = [(a.end(), b.start()) for a, b in pairwise(_TAG.finditer(text)) if (a[1], b[1]) == ("", "/")]
    if not pairs:
        return _NOTHING
    content = text[slice(*pairs[-1])]
    for find in (_hash, _boxed, _phrase):
        found, value = find(content)
        if found:
            return True, value
    return True, _of_span(content.strip())


def _phrase(text: str) -> Found:
    """What the last "Answer: ..." or "the answer is ..." that holds a digit says, up to its sentence's end."""
    for mark in reversed(list(_PHRASE.finditer(text))):
        span = text[mark.end() : mark.end() + MAX_SPAN].partition("\n")[0]
        if _DIGIT.search(span):
            return True, _of_span(span)
    return _NOTHING


def _last(text: str) -> Found:
    """The last number of the text."""
    matches = list(NUMBER.finditer(plain(text)))
    return (True, number(matches[-1])) if matches else _NOTHING


def _of_span(span: str) -> int | Fraction | None:
    """The number stated by what follows a marker.

    After a final `=` if there is one; the number that comes first, or else the only or last one. None
    if a scale word or another term of an expression follows it.
    """
    span = plain(span)
    span = span[: match.start()] if (match := _SENTENCE_END.search(span)) else span
    span = span.rpartition("=")[2].strip()
    matches = list(NUMBER.finditer(span))
    if not matches:
        return None
    match = matches[0] if not _WORD.search(span, 0, matches[0].start()) else matches[-1]
    if _TERM_FOLLOWS.match(span, match.end()) or _SCALE.match(span, match.end()):
        return None
    return number(match)


_WHERE: dict[str, tuple[Callable[[str], Found], ...]] = {
    "auto": (_hash, _boxed, _tag, _phrase, _last),
    "hash": (_hash,),
    "boxed": (_boxed,),
    "tag": (_tag,),
    "phrase": (_phrase,),
    "last": (_last,),
}


@lru_cache(maxsize=65536)
def _gold(gold: str | int | float) -> int | Fraction:
    """The reference as an exact number.

    Raises:
        DataError: it is none.
    """
    value = parse(str(gold))
    if value is None:
        raise DataError(f"gold: {gold!r} is not a number.")
    return value
