"""One plain form for the many ways to write a mathematical answer: Unicode, LaTeX and ASCII.

These rewrites keep the meaning; what an answer consists of is `structure`'s business.
"""

from __future__ import annotations

import re
from fractions import Fraction

from llm_gym.envs.grading.numbers import repeating
from llm_gym.envs.grading.symbols import ascii_mathematics

_WORDS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|pi|theta|infty|alpha|beta"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([_^])\s*(\d)(?=(?:\s|\\[,;:! ])+\d)", r"\1{\2}"),  # a script ends with its digit: log_2 32
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|boxed|fbox)(?![a-zA-Z])", ""),
        (r"\\h?phantom\s*(?:\{[^{}]*\}|.)", ""),
        (r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1"),
        (r"(?<=\d)(?:\\[,;! ]|\s?\{,\s?\}|,\\!)\s?(?=\d{3}(?!\d))", ""),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname)\*?\s*(?=\{)", r"\\text"),
        (r"\\text\s*\{\s*\}", ""),
        (r"\\\$|(?<!\\)\$|[€£¥₹]", ""),
        (r"\s*(?:\\?%|\\text\s*\{\s*(?:percent(?:age)?|pct)\s*\}|\b(?:percent(?:age)?|pct)\b)", "%"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])", "°"),
        (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![a-zA-Z])|!=|\\not\s*=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:approx(?:eq)?|simeq|sim|thickapprox|thicksim)(?![a-zA-Z])|~=", r"\\approx "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:ast|bullet)(?![a-zA-Z])", r"\\cdot "),
        (r"(?<=\d)_\s*(?:\{\(?\s*(?:\\text\s*\{)?\s*(?:10|ten)\s*\}?\)?\}|10(?!\d))", ""),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\*\*", "^"),
        (r"\\(?:times|cdotp)(?![a-zA-Z])|\*", r"\\cdot "),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:ldots|dots|cdots)(?![a-zA-Z])", "..."),
        (r"\\q?quad(?![a-z])|(?<!\\)\\[,;:! ]|~|\\\\$", " "),
        (r"(?i)(?<![a-z\\])(?:infinity|inf|oo)(?![a-z])", r"\\infty "),
        (rf"(?<![a-zA-Z\\])({_WORDS})(?![a-zA-Z])", r"\\\1 "),
        (r"\+\s*(?=\\infty)", ""),
        (r"(\\(?:sin|cos|tan|cot|sec|csc) *(?:\^ *(?:\d|\{\d\}))?) *(\d+(?:\.\d+)? *°)", r"\1(\2)"),
        (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
        (r"\\frac\s*(\\(?:pi|theta))\s*(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
        (r"\\frac\s*(\w)\s*(?=\{)", r"\\frac{\1}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"(?<![\w.,}\^])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),
        (r"(?<![\w.,}\^/])(\d+)\s+(\d+)/(\d+)(?![\w.(])", r"(\1+\\frac{\2}{\3})"),
        (r"\s+", " "),
    )
]
_WRAPPED = re.compile(r"(\*\*|__|`|\"|')(.*)\1")
_DOUBLE = re.compile(r"\\\\(?=[a-zA-Z])")
_CALL = re.compile(r"(\\sqrt|\^)\s*\(")


def clean(text: str) -> str:
    r"""The plain form of an answer.

    >>> clean(r"$\dfrac12\,\left(x+1\right)$"), clean("x² ≤ 3½"), clean(r"**\$10.**")
    ('\\frac{1}{2} (x+1)', 'x^{2} \\le (3+\\frac{1}{2})', '10')
    """
    text = repeating(ascii_mathematics(text).strip(), r"\frac{{{}}}{{{}}}")
    while (wrapped := _WRAPPED.fullmatch(text)) is not None:
        text = wrapped[2].strip()
    if "matrix" not in text and "array" not in text:
        text = _DOUBLE.sub(r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.rstrip(" .,;:" if not text.endswith("...") else " ,;:").lstrip(" ,;:")
    if text.startswith(".") and not text[1:2].isdigit():
        text = text.lstrip(" .,;:")
    return _braced(_turned(text))


_ENDS = re.compile(r"([\[\]])([^\[\]]*)([\[\]])")


def _turned(text: str) -> str:
    """Intervals with brackets turned outwards, `[0,1[`, with parentheses for those."""

    def interval(match: re.Match[str]) -> str:
        ends = re.split("[,;]", match[2])
        if len(ends) != 2 or not all(e.strip() and e.count("(") == e.count(")") for e in ends) or "\\cup" in match[2]:
            return match[0]
        return ("[" if match[1] == "[" else "(") + match[2] + ("]" if match[3] == "]" else ")")

    return _ENDS.sub(interval, text)


def _braced(text: str) -> str:
    """`sqrt(...)` and `^(...)` with braces for the parentheses."""
    while (call := _CALL.search(text)) is not None:
        end = closing(text, call.end() - 1)
        if end is None:
            return text
        text = text[: call.end() - 1].rstrip() + "{" + text[call.end() : end] + "}" + text[end + 1 :]
    return text


def closing(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at `start` (of whatever kind: `[0,1)` is one); None if none does."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None


_POWER = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.])")
_DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?![\d.])")


def exact_decimals(text: str) -> str:
    r"""Every decimal as the fraction it is, so that nothing is ever rounded: 0.25 is `\frac{1}{4}`, 3e8 has no e."""

    def fraction(match: re.Match[str]) -> str:
        value = Fraction(match[0])
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _DECIMAL.sub(fraction, _POWER.sub(r"(\1\\cdot 10^{\2})", text))


_SCALE = (
    r"(?!\s*(?:hundred|thousand|million|billion|trillion|dozen|square root|or|and|not|if|but|to|plus|minus|times|over"
    r"|by|squared|cubed|factorial|when|where|for|mod|more|less|base|choose|at|above|below|under|up|too|except)s?\b)"
)
"""Words after a number that change it, and so are no unit."""
_UNIT = re.compile(
    rf"(?:(?<=[\d)}}%°])|(?<=\\pi)|(?<=\\pi ))(?:\s*\\text\s*\{{{_SCALE}(?P<tex>[^{{}}]*)\}}"
    rf"|\s+{_SCALE}(?P<word>[a-zA-Z]{{2,}}(?:[ /][a-zA-Z]+)*)"
    r"|\s*(?P<glued>[cmk]m|kg|ft|mph|ml|degrees?))\s*(?:\^\s*\{?[23]\}?)?$"
)
_SYNONYMS = {
    name: row[0]
    for row in (
        ("cm", "centimeter", "centimetre"), ("mm", "millimeter", "millimetre"), ("km", "kilometer", "kilometre"),
        ("m", "meter", "metre"), ("ft", "foot", "feet"), ("in", "inch", "inche"), ("mi", "mile"), ("yd", "yard"),
        ("kg", "kilogram"), ("g", "gram"), ("lb", "pound"), ("s", "second", "sec"), ("min", "minute"),
        ("h", "hour", "hr"), ("day",), ("week",), ("month",), ("year",), ("dollar",), ("cent",), ("degree", "°"),
        ("radian",),
    )
    for name in row
}  # fmt: skip


def split_unit(text: str) -> tuple[str, str | None]:
    """(the answer without its unit, the unit's canonical name if it is a known one)."""
    unit: str | None = None
    while True:
        if text.endswith(("°", "%")):
            unit, text = "degree" if text[-1] == "°" else unit, text[:-1].rstrip()
        elif (match := _UNIT.search(text)) is not None:
            name = " ".join((match["tex"] or match["word"] or match["glued"]).lower().replace(".", "").split())
            square = "".join(c for c in text[match.end(match.lastgroup or 0) :] if c.isdigit())
            known = _SYNONYMS.get(name) or _SYNONYMS.get(name.removesuffix("s"))
            unit, text = f"{known}{square}" if known else unit, text[: match.start()].rstrip()
        else:
            return text, unit
