"""What stands beside a number in a text and makes it something else: a term, a bound, a denial, another number.

Every grade asks this, so it is tables of endings and no search where it can be.
"""

from __future__ import annotations

import re

from llm_gym.envs.grading.numbers import plain

_REACH = 48
"""Characters before a number that may change it."""
_OPENING = " $({[_\"'"
_RELATIONS = ("<", ">", "!=", "/=", "~=", "<=", ">=", "=<", "not=", "not =")
_NO_RELATION = re.compile(r"[-=]>$|>>$|<[^<>]{1,20}>$")
"""Arrows, calculator annotations and HTML tags end in a sign that is no relation."""


def _endings(phrases: str) -> tuple[str, ...]:
    return tuple(f" {phrase.strip()}" for phrase in phrases.split(","))


_BOUNDS = _endings(
    "at least, at most, at the least, at the most, at the very least, at the very most, than, than or equal to, exceed,"
    "exceeds, exceeding, exceeded, except, except for, no more, no less, anything but, nothing but, instead of,"
    "lower bound, lower bound is, upper bound, upper bound is, bounded by, limited to, rule out, rules out"
)
_DENIALS = (*_endings("not, never, cannot, nor, neither"), "n't")
_FILLERS = _endings(
    "be, is, equal, equals, equal to, to, exactly, just, the, number, the number, simply, really, actually, quite,"
    "necessarily, a, an"
)
_BEYOND = _endings("over, under, above, below, beyond, up to")
_STATES = (*_endings("is, are, was, be, just, well, slightly, far"), ":", "=")
"""What "over 5" follows if it is a bound: "it is over 5", and not "60 over 5"."""
_ABOUT = _endings(
    "about, approximately, approx, approx., around, roughly, nearly, almost, close to, circa, ca., estimated at,"
    "an estimated, some"
)
_LAST_WORDS = frozenset(words.split()[-1] for words in (*_BOUNDS, *_DENIALS, *_FILLERS, *_BEYOND, *_ABOUT))
_SIGNS = frozenset("<>=~")
"""What ends in none of these words or signs is no bound: most replies, told at once."""
_COMMAND = re.compile(r"\\([a-z]+) ?=?(?:[_[{(].{0,3})?$")
_DENYING = frozenset(
    "le leq leqq leqslant ge geq geqq geqslant ne neq lt gt nleq ngeq nless ngtr ll gg lesssim gtrsim not lnot neg"
    " equiv propto".split()
)
_ABOUTS = frozenset("approx approxeq simeq sim cong thickapprox thicksim".split())
_LAYOUT = frozenset(
    "rightarrow longrightarrow implies to therefore boxed displaystyle textstyle item hline newline end text"
    " quad".split()
)
_TERMS = _endings(
    "root of, half of, third of, quarter of, square of, cube of, log of, logarithm of, reciprocal of, factorial of,"
    "percent of, twice, double, triple, log, ln, sin, cos, tan, sqrt, times, plus, divided by, multiplied by, modulo,"
    "mod, over, under"
)
_TERM = re.compile(
    r"[a-z0-9)\]}!%°] ?[-+*/^]$|[0-9)] x$|[0-9] :$|[0-9] minus$|% ?of$"
    r"|\b(?:log|ln|sin|cos|tan)(?: base |[_^])?\{?\d+\}?(?: of)?$"  # log_2 8
)
_SUMMAND = re.compile(r"[0-9)\]}%°]$|\\[a-z]+$|(?<![a-z])[b-hj-z]$")
_OPERATOR = r"(?:[-+*/^]|\\(?:times|cdot|div|ast|bullet|over)(?![a-zA-Z])|\bx\b)"
_CHANGED = re.compile(
    rf"\s*!?\s*(?:{_OPERATOR}|=)\s*[\d(\\$]|\(\s*[-\\\d]|\s+\\(?!Rightarrow|implies|to|therefore|item|hline|text|end)[a-z]"
    r"|\s*(?:hundred|thousand|million|billion|trillion)|\s*(?:or\s+(?:more|less|so|fewer|greater|above|below)\b|\+(?!\S))"
    r"|\s*(?:at\s+(?:least|most)|and\s+(?:up|above|over))\b"
    r"|\s+(?:(?:is|are|was|were)\s+(?:wrong|incorrect|not|too|impossible|ruled\s+out)|isn't|can(?:no|')t)\b|\s+(?:squared|cubed|factorial)\b"
    r"|\s+(?:plus|minus|times|over|mod|choose|divided\s+by|multiplied\s+by|to\s+the(?:\s+power)?)\s+[\d(\\$]"
    r"|\s*(?:<=|>=|!=|<\s|>\s*[\w\\]|\\(?:leq?|geq?|neq?|lt|gt|approx)(?![a-zA-Z]))|\s+:\s+\d",
    re.IGNORECASE,
)
_CALL = re.compile(r"[a-zA-Z]\(")
"""Stands before the argument of a function, `f(5)`."""
_BARS = re.compile(r"\|[-+\d.,]+\|")
_TIMES = re.compile(r"(?<=[\d)%])\s*[xX]\s*(?=[\d($.])")
_MEMBER = re.compile(r"[=,;:\n]|\\(?:Rightarrow|implies|text)|\b(?:so|and|or|then|thus|hence|is|means|therefore|get)\b")
_ARGUMENTS = re.compile(r"_\s*(?:\{[^{}]*\}|\w)|(?<=[A-Za-z])\([^()]*\)")
_LETTER = r"(?<![A-Za-z\\'])[abcknpqruvwxyz](?![A-Za-z'(_])(?!\s+[A-Za-z]{2})"
_UNKNOWN = re.compile(
    rf"\d\s*\*?\s*{_LETTER}|{_LETTER}\s*[-+*/^]\s*[\d(]|[\d)]\s*[-+*/]\s*{_LETTER}|^\s*-\s*{_LETTER}\s*$", re.IGNORECASE
)


def before(text: str, start: int) -> str:
    """What stands before an answer, in lower case, single spaces and without the signs that open it."""
    return " " + " ".join(text[max(0, start - _REACH) : start].lower().split()).rstrip(_OPENING)


def denied(tail: str, *, whole: bool) -> bool:
    """Whether the words before an answer deny it or make it a bound (or, for a whole number, an approximation).

    Args:
        tail: what `before` returned.
        whole: a whole number is wanted.
    """
    word = tail[tail.rfind(" ") + 1 :]
    if word not in _LAST_WORDS and word[-2:] != "'t" and word[-1:] not in _SIGNS and "\\" not in tail:
        return False
    if tail.endswith(_RELATIONS):
        return _NO_RELATION.search(tail) is None
    if tail.endswith(_BOUNDS) or tail.endswith(_DENIALS) or (whole and tail.endswith(_ABOUT)):
        return True
    if tail.endswith(_BEYOND):
        lead = tail.removesuffix(" to").rpartition(" ")[0]
        return not lead or lead.endswith(_STATES)
    if tail.endswith(_FILLERS):
        while tail.endswith(_FILLERS):
            tail = tail.rpartition(" ")[0]
        return tail.endswith(_DENIALS)
    if whole and tail.endswith("~"):
        lead = tail[:-1].rstrip()
        return not lead or lead.endswith(_STATES)
    if "\\" in tail and (command := _COMMAND.search(tail)) is not None:
        lead = tail[: command.start()].rstrip()
        leading = not lead or lead.endswith(_STATES)
        return command[1] in _DENYING or (whole and command[1] in _ABOUTS and leading)
    return False


def denied_in(text: str, *, whole: bool) -> bool:
    """As `denied`, of the raw text before an answer."""
    tail = plain(text[-2 * _REACH :])
    return denied(before(tail, len(tail)), whole=whole)


def changed(text: str, match: re.Match[str], tail: str) -> bool:
    """Whether a number is a term of an expression, or what follows makes it another: a scale, "or more", `< x`.

    Args:
        text: what `numbers.plain` returned.
        match: the number.
        tail: what stands `before` it.
    """
    if _CHANGED.match(text, match.end()) or (match["sign"] and _added(text, match.start(), tail)):
        return True
    last = tail[-1]
    if (last in "+-*/^x:sf}" or last.isdigit()) and _TERM.search(tail):
        return True
    if _CALL.match(text, max(0, match.start() - 2)):
        return True
    if tail.endswith(_TERMS) or (last == "|" and _BARS.match(text, match.start() - 1)):
        return True
    if "\\" in tail and (command := _COMMAND.search(tail)) is not None:
        return command[1] not in _LAYOUT and command[1] not in _ABOUTS
    return last == "=" and unsolved(text, text.rindex("=", 0, match.start()))


def _added(text: str, sign: int, tail: str) -> bool:
    """Whether a sign adds or takes away: "28 + 32", "5 apples + 10", but not "it was -10"."""
    apart = text[sign + 1 : sign + 2] == " " and tail[-1].isalnum() and not tail.endswith(_STATES)
    return apart or _SUMMAND.search(tail) is not None


def negated(tail: str) -> bool:
    """Whether the word before a number is "minus" or "negative"."""
    return tail.endswith((" minus", " negative"))


def unsolved(text: str, equals: int) -> bool:
    """Whether an unknown is still among the terms left of an equals sign: `2x = 6` does not say what x is."""
    left = _TIMES.sub(" * ", _MEMBER.split(text[max(0, equals - 2 * _REACH) : equals])[-1])
    return _UNKNOWN.search(_ARGUMENTS.sub("", left)) is not None
