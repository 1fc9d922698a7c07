"""Reads the answer out of the span that states it: as a number, as a choice, or as the text of anything else."""

from __future__ import annotations

import re
from enum import Enum
from fractions import Fraction
from itertools import pairwise

from llm_gym.envs.grading.beside import before, changed, denied, denied_in, negated
from llm_gym.envs.grading.numbers import NUMBER, SPACED, number, parse, plain
from llm_gym.envs.grading.where import SAYS, Span, last_formula

Value = int | Fraction


class Refused(Enum):
    """What is stated, but is not one answer."""

    HEDGED = "The reply states several different answers."
    BOUND = "The reply states a bound, an approximation or a denial, and no answer."


def number_in(span: Span, *, whole: bool, alone: bool = False) -> Value | Refused | None:
    """The number a span states; None if it states none that stands alone.

    Args:
        span: where it stands.
        whole: a whole number is wanted, so an approximation is none.
        alone: nothing but a number is wanted: names, units and work around it are read here and not left to a worker.
    """
    if not span.loose:
        return value if (value := parse(span.text)) is not None or not alone else _of_box(span.text, whole)
    if span.marked:
        return _of_phrase(span.text, whole)
    if _BROKEN.search(span.text):
        return None
    if len(span.text) < 100 and (value := parse(span.text)) is not None:
        return value
    formula = last_formula(span.text)
    if formula is None or NUMBER.search(plain(formula.after)):
        return _last(span.text, whole)
    if denied_in(formula.before, whole=whole):
        return Refused.BOUND
    return _of_phrase(formula.text, whole)


_BROKEN = re.compile(r"(?:\$|\\\()[ \t]*\n[^$\\]*\n[ \t]*(?:\$|\\\))[ \t]*$")
"""An inline formula over several lines, at the end: broken markup, which states nothing."""
_WORD = re.compile(r"\w")
_SENTENCE_END = re.compile(r"[.!?;](?=\s+[^\W\d])")
_EITHER = re.compile(
    r"[^\w\n]*(?:[a-z]+[^\w\n]+){0,3}(?:or|either|maybe|perhaps|possibly|otherwise|else|alternatively)\b[^\w\n]*"
    r"(?:[a-z]+[^\w\n]+){0,3}|\s*(?:[,;|&]|,?\s*and\b|to\b|\s)\s*(?:[a-z]\s*=\s*)?|\s*/\s*[a-z]\s*=\s*"
    r"|[^\w\n]*(?:[a-z]+[^\w\n]+){0,2}(?:if|when|unless)\b[^.\n]*(?:[,;]|\b(?:and|or|but|else|otherwise)\b)[^\w\n]*"
    r"(?:in\s+which\s+case[^\w\n]+)?(?:it\s+is[^\w\n]+)?(?:[a-z]\s*=\s*)?",
    re.IGNORECASE,
)
"""What stands between two numbers of which either may be the answer, or of several answers."""
_COMMA_DECIMAL = re.compile(r"(?<![\w.,])(-?\d+),(\d{1,2})(?![\w,]|\.\d)")
_CALCULATION = re.compile(r"[\d\s.,+*/()$%-]+")


def _of_box(text: str, whole: bool) -> Value | Refused | None:
    """The number in a box, whose outer braces LaTeX does not show."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    return _of_phrase(text, whole)


_LONE = re.compile(r"\s*(-?[0-9]{1,9})\.?\s*")
"""A whole number and nothing else: most replies, and nothing else to look at."""


def _of_phrase(span: str, whole: bool) -> Value | Refused | None:
    """The number stated by what follows a marker.

    After a final `=` if there is one (or before the first, if what follows is a calculation); the number that comes
    first, or else the only or last one.
    """
    if lone := _LONE.fullmatch(span):
        return int(lone[1])
    span = plain(span)
    span = span[: match.start()] if (match := _SENTENCE_END.search(span)) else span
    if SPACED.fullmatch(bare := span.strip(" .$")):
        return parse(bare)
    matches = list(NUMBER.finditer(span))
    if _hedged(span, matches):
        return Refused.HEDGED
    start = span.rfind("=") + 1
    inside = [match for match in matches if match.start() >= start]
    value, inside = None, _affirmed(span, inside)
    if inside:
        value = _stated(span, inside[-1 if _WORD.search(span, start, inside[0].start()) else 0], whole)
    if value is None and start and matches and _CALCULATION.fullmatch(span, start):
        first = span[: span.index("=")].rstrip()
        return _stated(first, matches[0], whole) if matches[0].end() == len(first) else None
    return value


def _last(text: str, whole: bool) -> Value | Refused | None:
    """The last number of a text, unless it is a term of a sum or one of several alternatives."""
    text = plain(text)
    matches = list(NUMBER.finditer(text))
    if not matches:
        commas = list(_COMMA_DECIMAL.finditer(text))
        return Fraction(f"{commas[-1][1]}.{commas[-1][2]}") if commas else None
    if _hedged(text, matches[-2:]):
        return Refused.HEDGED
    return _stated(text, _affirmed(text, matches)[-1], whole)


_NOT = re.compile(r"[^\w\n]*(?:(?:and|but)\s+)?(?:not|rather\s+than|instead\s+of)\s+[^\w\n]*")


def _affirmed(text: str, matches: list[re.Match[str]]) -> list[re.Match[str]]:
    """The numbers of a text without a last one that is only ruled out: "5, not 6"."""
    ruled_out = len(matches) > 1 and _NOT.fullmatch(text, matches[-2].end(), matches[-1].start())
    return matches[:-1] if ruled_out else matches


def _stated(text: str, match: re.Match[str], whole: bool) -> Value | Refused | None:
    """The value of a number that stands alone in a text."""
    tail = before(text, match.start())
    if denied(tail, whole=whole):
        return Refused.BOUND
    value = None if changed(text, match, tail) else number(match)
    return -value if value is not None and negated(tail) else value


def _hedged(text: str, matches: list[re.Match[str]]) -> bool:
    """Whether two different numbers are joined by "or", or stand in one list."""
    for one, two in pairwise(matches):
        between = text[one.end() : two.start()]
        term = two["sign"] and not between.strip()  # 28 + 32
        if len(between) <= 60 and not term and _EITHER.fullmatch(between) and number(one) != number(two):
            return True
    return False


_CHOICE = re.compile(r"(?:\\text\s*\{)?\s*\(?([A-J])\)?\.?\s*\}?")
_CHOSEN = re.compile(r"\W*(?:(?:option|choice)\s+)?(?:\\text\s*\{)?[(*]*([A-J])(?:[)*.:}]+(?:\s.*)?|\W*)")
_LAST_CHOICE = re.compile(r"\(([A-J])\)|\b(?:option|choice|is)\s+\**([A-J])\b(?!\w)", re.IGNORECASE)


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer (`B`, `(B)`, `\\text{(B)}`, `B) 12 cm`); None for anything else."""
    match = _CHOICE.fullmatch(text.strip()) or _CHOSEN.fullmatch(text.strip())
    return match[1] if match else None


_ABOUT = re.compile(r"\s*(?:about|approximately|approx\.|around|roughly|nearly)\s+(?=[\d.$\\-])", re.IGNORECASE)


def stated(span: Span, *, letter: bool, whole: bool = False) -> str | Refused | None:
    """The text of the answer, without the words around it; None if there is none.

    Args:
        span: where it stands.
        letter: a letter of a multiple choice is wanted.
        whole: a whole number is wanted.
    """
    text = span.text
    if letter and not span.marked and (found := [m for m in _LAST_CHOICE.finditer(text) if (m[1] or m[2]).isupper()]):
        if denied_in(text[: found[-1].start()], whole=False):
            return Refused.BOUND
        return str(found[-1][1] or found[-1][2])
    if not span.marked and _BROKEN.search(text):
        return None
    if span.loose:
        words, text = _from_words(text, span.marked)
        if denied_in(words, whole=whole):
            return Refused.BOUND
        text = text if whole else text[about.end() :] if (about := _ABOUT.match(text)) else text
    text = text.strip()
    return text if SAYS.search(text) else None


def _from_words(text: str, marked: bool) -> tuple[str, str]:
    """What precedes it, and the last formula of running text; or the sentence (after a marker), or the last line."""
    if marked and (end := re.search(r"[.!?](?=\s+[^\W\d])", text)):
        text = text[: end.start()]
    if (formula := last_formula(text)) is not None:
        return formula.before, formula.text
    line = text.strip().rpartition("\n")[2]
    return "", re.sub(r"^[\s:*_`]+|[\s*_`.!]+$", "", line)
