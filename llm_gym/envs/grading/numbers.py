"""Exact numbers in running text: commas, currency, signs, decimals, fractions, percent.

A number is accepted only whole: `12.5` never yields 12 and `5abc` never yields 5. Values are exact
(`fractions.Fraction` or `int`), so `12.0 == 12` and `1/2 == 0.5`, with no rounding anywhere.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 400
"""A longer run of digits is no answer (and could be made to cost quadratic time)."""

_CURRENCY = r"[$€£¥₹]"
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""
    (?<![\w.,/^:*{{])(?<![\w)\]]-)(?<![\w)\]]\+)   # not glued to a word, and no term of an expression
    (?P<sign>[-+]?)\s?{_CURRENCY}?(?P<inner>[-+]?)(?P<value>{_UNSIGNED})
    (?:/(?P<over>\d+))?
    (?!\w|[.,:]\d|[*/^\\])                        # whole: not 5abc, 1,00, 5:30, 2^3, 3*4, 4\\sqrt{{2}}
    """,
    re.VERBOSE | re.ASCII,
)
"""A whole number, decimal or simple fraction in text that `plain` has normalised."""

_LATEX = (
    (re.compile(r"\\[cdt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[cdt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<=\d)(?:\\[,;!]|,\\!|\{,\})(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\(?=[$%])|\\[()\[\]]"), ""),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|`"), " "),
    (re.compile(r"(?<=[A-Za-z])\$|\$(?!\s?[-+]?[\d.])"), " "),
)
_MINUS = str.maketrans("−–‐‑﹣－", "------")
_MARKUP = re.compile(r"[\\*_`${]")


def plain(text: str) -> str:
    """Text with full-width digits, Unicode minus, Markdown and simple LaTeX reduced to ASCII forms."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_MINUS))
    if _MARKUP.search(text):
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return text


def number(match: re.Match[str]) -> int | Fraction | None:
    """The exact value of a `NUMBER` match; None for a zero denominator, two signs or too many digits."""
    sign, inner, digits, over = match.group("sign", "inner", "value", "over")
    if (sign and inner) or len(digits) > MAX_DIGITS or len(over or "") > MAX_DIGITS:
        return None
    digits = digits.replace(",", "")
    value: int | Fraction = Fraction(digits) if "." in digits else int(digits)
    if over is not None:
        if int(over) == 0:
            return None
        value = Fraction(value) / int(over)
    return -value if "-" in (sign, inner) else value


def parse(text: str) -> int | Fraction | None:
    """The value of a text that is one number and nothing else; None if it is not.

    >>> parse("$1,234.50"), parse("-7"), parse("12.0"), parse("5abc"), parse("1,00")
    (Fraction(2469, 2), -7, Fraction(12, 1), None, None)
    """
    text = plain(text).strip().rstrip(".%").strip()
    match = NUMBER.match(text)
    return number(match) if match is not None and match.end() == len(text) else None
