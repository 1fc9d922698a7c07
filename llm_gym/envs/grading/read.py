"""Reads the answer out of the span that states it: as a number, as a choice, or as the text of anything else."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from llm_gym.envs.grading.numbers import NUMBER, number, parse, plain
from llm_gym.envs.grading.where import Span, last_formula

Value = int | Fraction


class Hedged:
    """Several different answers where one is wanted."""


def number_in(span: Span) -> Value | Hedged | None:
    """The number a span states; None if it states none that stands alone."""
    if not span.loose:
        return parse(span.text)
    if span.marked:
        return _of_phrase(span.text)
    if _BROKEN.search(span.text):
        return None
    if len(span.text) < 100 and (whole := parse(span.text)) is not None:
        return whole
    formula = last_formula(span.text)
    if formula is None or NUMBER.search(plain(formula[1])):
        return _last(span.text)
    return _of_phrase(formula[0])


_BROKEN = re.compile(r"(?:\$|\\\()[ \t]*\n[^$\\]*\n[ \t]*(?:\$|\\\))[ \t]*$")
"""An inline formula over several lines, at the end: broken markup, which states nothing."""
_WORD = re.compile(r"\w")
_SCALE = re.compile(r"\s*(?:hundred|thousand|million|billion|trillion)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;](?=\s+[^\W\d])")
_OPERATOR = r"(?:[-+*/^×÷·]|\\times|\\cdot|\bx\b)"
_TERM_FOLLOWS = re.compile(rf"\s*(?:{_OPERATOR}|=)\s*[\d(\\$]")
_INEXACT = re.compile(r"\s*(?:or\s+(?:more|less|so)\b|\+(?!\S))")
_TERM_PRECEDES = re.compile(rf"[\w)\]}}]\s*{_OPERATOR}\s*[$(]?$")
_EITHER = re.compile(
    r"[^\w\n]*(?:[a-z%$]+[^\w\n]+)?(?:or|either|maybe|perhaps|possibly)\b[^\w\n]*(?:[a-z]+[^\w\n]+){0,3}"
    r"|\s*(?:[,;|/&]|,?\s*and\b|to\b|\s)\s*(?:[a-z]\s*=\s*)?",
    re.IGNORECASE,
)
"""What stands between two numbers of which either may be the answer, or of several answers."""
_COMMA_DECIMAL = re.compile(r"(?<![\w.,])(-?\d+),(\d{1,2})(?![\w,]|\.\d)")


def _of_phrase(span: str) -> Value | Hedged | None:
    """The number stated by what follows a marker.

    After a final `=` if there is one; the number that comes first, or else the only or last one. None
    if a scale word or another term of an expression follows it.
    """
    span = plain(span)
    span = span[: match.start()] if (match := _SENTENCE_END.search(span)) else span
    if _hedged(span, list(NUMBER.finditer(span))):
        return Hedged()
    span = span.rpartition("=")[2].strip()
    matches = list(NUMBER.finditer(span))
    if not matches:
        return None
    match = matches[0] if not _WORD.search(span, 0, matches[0].start()) else matches[-1]
    return None if _changed(span, match) else number(match)


def _last(text: str) -> Value | Hedged | None:
    """The last number of a text, unless it is a term of a sum or one of several alternatives."""
    text = plain(text)
    matches = list(NUMBER.finditer(text))
    if not matches:
        commas = list(_COMMA_DECIMAL.finditer(text))
        return Fraction(f"{commas[-1][1]}.{commas[-1][2]}") if commas else None
    if _hedged(text, matches[-2:]):
        return Hedged()
    before = text[max(0, matches[-1].start() - 20) : matches[-1].start()]
    return None if _TERM_PRECEDES.search(before) or _changed(text, matches[-1]) else number(matches[-1])


def _changed(text: str, match: re.Match[str]) -> bool:
    """Whether what follows a number makes it another: a scale word, a term, "or more"."""
    return any(follows.match(text, match.end()) for follows in (_TERM_FOLLOWS, _SCALE, _INEXACT))


def _hedged(text: str, matches: list[re.Match[str]]) -> bool:
    """Whether two different numbers are joined by "or", or stand in one list."""
    for one, two in pairwise(matches):
        between = text[one.end() : two.start()]
        if len(between) <= 60 and _EITHER.fullmatch(between) and number(one) != number(two):
            return True
    return False


_CHOICE = re.compile(r"(?:\\text\s*\{)?\s*\(?([A-J])\)?\.?\s*\}?")
_CHOSEN = re.compile(r"\W*(?:(?:option|choice)\s+)?(?:\\text\s*\{)?[(*]*([A-J])(?:[)*.:}]+(?:\s.*)?|\W*)")
_LAST_CHOICE = re.compile(r"\(([A-J])\)|\b(?:option|choice|is)\s+\**([A-J])\b(?!\w)", re.IGNORECASE)


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer (`B`, `(B)`, `\\text{(B)}`, `B) 12 cm`); None for anything else."""
    match = _CHOICE.fullmatch(text.strip()) or _CHOSEN.fullmatch(text.strip())
    return match[1] if match else None


def stated(span: Span, *, letter: bool) -> str | None:
    """The text of the answer, without the words around it; None if there is none.

    Args:
        span: where it stands.
        letter: a letter of a multiple choice is wanted.
    """
    text = span.text
    if letter and not span.marked and (found := [m for m in _LAST_CHOICE.finditer(text) if (m[1] or m[2]).isupper()]):
        return str(found[-1][1] or found[-1][2])
    if not span.marked and _BROKEN.search(text):
        return None
    if span.loose:
        text = _from_words(text, span.marked)
    text = text.strip()
    return text if re.search(r"[^\W_]|\\", text) else None


def _from_words(text: str, marked: bool) -> str:
    """The last formula of running text, or else the sentence (after a marker) or the last line."""
    if marked and (end := re.search(r"[.!?](?=\s+[^\W\d])", text)):
        text = text[: end.start()]
    if (formula := last_formula(text)) is not None:
        return formula[0]
    line = text.strip().rpartition("\n")[2]
    return re.sub(r"^[\s:*_`]+|[\s*_`.!]+$", "", line)
