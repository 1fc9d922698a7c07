"""Where the answer stands in a reply: `find(text, where)` returns the span that states it.

The policies are explicit. `auto` follows the usual rules: the last `#### ...`; or the last
`\\boxed{...}` (but a "final answer is ..." after it counts); or the last `<answer>...</answer>`; or
the last line or sentence "Answer: ...", "A: ...", "the answer is ..."; or else what the text ends with. A marker whose
content is no answer is no answer: it never falls back to something weaker.

Every function here takes time linear in the text, and none recurses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

MAX_TEXT = 100_000
"""Characters of a reply that are read, from its end."""
MAX_SPAN = 300
"""An answer stands within so many characters of its phrase."""
MAX_JOINED = 64
"""Most answers beside each other that are read as one list."""
AND = r" \text{ and } "
"""Joins answers that "and" or "or" stands between into one list, whose order means nothing."""
LISTED = " ; "
"""Joins the others, that stand side by side, into one list as written."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a reply that states its answer."""

    text: str
    """What stands there."""
    loose: bool = False
    """It is running text: words may stand around the answer."""
    marked: bool = True
    """Something marks it as the answer; else it is all there was."""


def answer_part(text: str) -> str | None:
    """The reply after its thinking, at most `MAX_TEXT` characters from its end; None if the thinking never ended."""
    _, closed, answer = text.rpartition("</think>")
    return None if not closed and "<think>" in answer else answer[-MAX_TEXT:]


def find(text: str, where: str, *, numeric: bool = False) -> Span | None:
    """The span that states the answer of `text` (without thinking); None if none does.

    Args:
        text: what `answer_part` returned.
        where: a policy of `WHERE`.
        numeric: the answer is a number, so a phrase that no digit follows ("the answer is below") states none.
    """
    for finder in WHERE[where]:
        if (span := finder(text, numeric)) is not None:
            return span
    return None


def _hash(text: str, numeric: bool) -> Span | None:
    """What follows the last `####`, on its line."""
    _, mark, tail = text.rpartition("####")
    return Span(tail.lstrip(": \t").partition("\n")[0], loose=True) if mark else None


_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?P<open>\{)?|\\[{}]|(?P<brace>[{}])")
_BARE = re.compile(r"\s*(-?\.?\w[\w.,]*)")


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every outermost box, in order; a last one that never closes is empty."""
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []  # a box's (start, start of content), or None for another brace
    for token in _BRACE.finditer(text):
        if token["open"]:
            opened.append((token.start(), token.end()))
        elif token["brace"] == "{":
            opened.append(None)
        elif token["brace"] == "}":
            box = opened.pop() if opened else None
            if box is not None:
                while found and found[-1][0] >= box[0]:
                    found.pop()
                found.append((box[0], token.end(), text[box[1] : token.start()]))
        elif token[0][1] in "bf" and (bare := _BARE.match(text, token.end())):
            found.append((token.start(), bare.end(), bare[1].rstrip(".,")))
    cut = max((box[0] for box in opened if box is not None), default=-1)
    return [*found, (cut, len(text), "")] if cut > (found[-1][0] if found else -1) else found


def _boxed(text: str, numeric: bool) -> Span | None:
    """The content of the last box, with those that stand beside it."""
    boxes = _boxes(text)
    return Span(_joined(text, boxes)) if boxes else None


_LAYOUT = re.compile(r"\$|\\[()\[\],;!: ]|\\q?quad(?![a-z])|\\text\s*\{([^{}]*)\}|[*{}]")
_CONNECTOR = re.compile(
    r"\s*(?:[,;/|]?\s*(?:\w+\s+)?(?:and|or)\b(?:\s+(?:maybe|perhaps|possibly|else)\b)?|[,;/|])?\s*(?:(?:maybe|perhaps|possibly|otherwise|alternatively)\b,?\s*)?(?:[\w()\\]{1,8}\s*=)?\s*"
)


def _joined(text: str, pieces: list[tuple[int, int, str]]) -> str:
    """The last of `pieces`, and the ones before it that only `and`, `or` or a comma separates from it."""
    last, joint = [pieces[-1][2].strip()], LISTED
    nearest = pieces[-MAX_JOINED:]
    for before, after in zip(nearest[-2::-1], nearest[:0:-1], strict=True):
        between = text[before[1] : after[0]]
        words = " ".join(_LAYOUT.sub(r" \1", between).split())
        if len(between) > 60 or not _CONNECTOR.fullmatch(words):
            break
        joint = AND if re.search(r"\b(?:and|or)\b", words) else joint
        last.append(before[2].strip())
    return last[0] if len(set(last)) == 1 else joint.join(reversed(last))


_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def _tag(text: str, numeric: bool) -> Span | None:
    """The content of the last answer tag; a box or a phrase inside it is opened first."""
    tags = [
        (a.start(), b.end(), text[a.end() : b.start()])
        for a, b in pairwise(_TAG.finditer(text))
        if (a[1], b[1]) == ("", "/")
    ]
    if not tags:
        return None
    content = _joined(text, tags)
    for finder in (_hash, _boxed, _phrase):
        if (span := finder(content, numeric)) is not None:
            return span
    return Span(content, loose=True)


_PHRASE = re.compile(
    r"(?:^[ \t]*(?:[*_]*)a(?:[*_]*):|\banswer(?:\s+is\b|\s*[:=]|[*_]+\s*[:=]|\s*:?[*_]+\s*:?)\s*:?)",
    re.IGNORECASE | re.MULTILINE,
)
_ELSEWHERE = re.compile(
    r"(?:答案|答え|정답|답|ответ|antwort|réponse|respuesta|resposta|risposta|उत्तर|الجواب|الإجابة)[*_ ]*[:：][*_ ]*"
    r"|答案(?:是|为)",
    re.IGNORECASE,
)
"""The same in other languages."""
_FOREIGN = ("ntwort", "spuesta", "sposta", "NTWORT", "SPUESTA", "SPOSTA")
_DIGIT = re.compile(r"\d")
SAYS = re.compile(r"[^\W_]|[\\∅∞]")
"""What has none of these states nothing."""
_FINAL = re.compile(r"\bfinal answer(?:\s+is\b|\s*[:=])", re.IGNORECASE)


def _phrase(text: str, numeric: bool) -> Span | None:
    """What the last "Answer: ..." or "the answer is ..." says, on its line."""
    says = _DIGIT if numeric else SAYS
    marks = list(_PHRASE.finditer(text))
    if not text.isascii() or any(word in text for word in _FOREIGN):
        marks = sorted([*marks, *_ELSEWHERE.finditer(text)], key=lambda mark: mark.start())
    for mark in reversed(marks):
        span = text[mark.end() : mark.end() + MAX_SPAN].partition("\n")[0]
        if says.search(span):
            return Span(span, loose=True)
    return None


def _final(text: str, numeric: bool) -> Span | None:
    """What the last "final answer is ..." says, if no box follows it: earlier boxes were steps."""
    marks = list(_FINAL.finditer(text))
    boxes = _boxes(text) if marks else []
    if not marks or not boxes or boxes[-1][1] > marks[-1].start():
        return None
    return _phrase(text[marks[-1].start() :], numeric)


def _rest(text: str, numeric: bool) -> Span | None:
    """The whole text: the last thing in it counts."""
    return Span(text, loose=True, marked=False) if text.strip() else None


_DELIMITER = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
_CLOSES = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}


def formulas(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every `$...$`, `$$...$$`, `\\(...\\)` and `\\[...\\]`, in order."""
    found: list[tuple[int, int, str]] = []
    opened: re.Match[str] | None = None
    for token in _DELIMITER.finditer(text):
        if opened is None:
            opened = token if token[0] in _CLOSES else None
        elif token[0] == _CLOSES[opened[0]]:
            if content := text[opened.end() : token.start()].strip():
                found.append((opened.start(), token.end(), content))
            opened = None
    return found


class Formula(NamedTuple):
    """A formula in running text."""

    before: str
    """The text before it."""
    text: str
    """What stands in it, with those that stand beside it."""
    after: str
    """The text after it."""


def last_formula(text: str) -> Formula | None:
    """The last formula of a text; None if there is none."""
    found = formulas(text)
    return Formula(text[: found[-1][0]], _joined(text, found), text[found[-1][1] :]) if found else None


WHERE: dict[str, tuple[Callable[[str, bool], Span | None], ...]] = {
    "auto": (_hash, _final, _boxed, _tag, _phrase, _rest),
    "hash": (_hash,),
    "boxed": (_boxed,),
    "tag": (_tag,),
    "phrase": (_phrase,),
    "last": (_rest,),
}
"""Policy -> the finders tried in order."""
