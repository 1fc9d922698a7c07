"""Exact numbers in running text: commas, currency, signs, decimals, fractions, mixed numbers, percent.

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
_UNSIGNED = r"(?:(?!0,)\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""
    (?<![\w.,/^:*{{])(?<![\w)\]]-)(?<![\w)\]]\+)   # not glued to a word, and no term of an expression
    (?P<sign>[-+]?)\s?{_CURRENCY}?(?P<inner>[-+]?)
    (?:(?P<whole>\d+)[ ](?=\d+/))?                # 2 1/2
    (?P<value>{_UNSIGNED})
    (?:/(?P<over>\d+)|[eE](?P<power>[-+]?\d{{1,3}}))?
    (?!\w|[.,:]\d|[*/^\\])                        # whole: not 5abc, 1,00, 5:30, 2^3, 3*4, 4\\sqrt{{2}}
    """,
    re.VERBOSE | re.ASCII,
)
"""A whole number, decimal, simple fraction or mixed number in text that `plain` has normalised."""

_LATEX = (
    (re.compile(r"(?<=\d)\s*\\[cdt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"(?<=\d)\s*\\[cdt]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\\[cdt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[cdt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<=\d)(?:\\[,;!]|,\\!|\s?\{,\s?\})\s?(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\(?=[$%])|\\[()\[\]]"), ""),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|`"), " "),
    (re.compile(r"(?<=[A-Za-z])\$|\$(?!\s?[-+]?[\d.])"), " "),
)
_GLUED_UNIT = re.compile(r"(?<=\d)(?:[kcm]?m[²³]|(?:[kcm]m|kg|mg|ml|ft|mph)[²³]?)(?!\w)")
_SPACED = re.compile(r"[-+]?[1-9]\d{0,2}(?: \d{3})+")
_MINUS = str.maketrans("−–‐‑﹣－", "------")
_VULGAR = re.compile(r"(\d?)([¼-¾⅐-⅞])")
_MARKUP = re.compile(r"[\\*_`${]")


def plain(text: str) -> str:
    """Text with full-width digits, Unicode minus, Markdown, simple LaTeX and glued units reduced to ASCII."""
    text = _GLUED_UNIT.sub("", text)
    if not text.isascii():
        text = _VULGAR.sub(lambda m: f"{m[1]} {unicodedata.normalize('NFKC', m[2])}".lstrip(), text)
        text = unicodedata.normalize("NFKC", text.translate(_MINUS)).replace("\N{FRACTION SLASH}", "/")
    if _MARKUP.search(text):
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return text


def number(match: re.Match[str]) -> int | Fraction | None:
    """The exact value of a `NUMBER` match; None for a zero denominator, two signs or too many digits."""
    sign, inner, digits, whole = match.group("sign", "inner", "value", "whole")
    over, power = match.group("over", "power")
    if (sign and inner) or max(map(len, (digits, over or "", whole or ""))) > MAX_DIGITS:
        return None
    digits = digits.replace(",", "")
    value: int | Fraction = Fraction(digits) if "." in digits else int(digits)
    if over is not None:
        if int(over) == 0:
            return None
        value = Fraction(value) / int(over) + int(whole or 0)
    elif power is not None:
        value = value * Fraction(10) ** int(power)
    return -value if "-" in (sign, inner) else value


def parse(text: str) -> int | Fraction | None:
    """The value of a text that is one number and nothing else; None if it is not.

    >>> parse("$1,234.50"), parse("-7"), parse("12.0"), parse("2 1/2"), parse("5abc"), parse("1,00")
    (Fraction(2469, 2), -7, Fraction(12, 1), Fraction(5, 2), None, None)
    """
    text = plain(text).strip().rstrip(".%").strip()
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    match = NUMBER.match(text)
    return number(match) if match is not None and match.end() == len(text) else None


def approximates(shown: int | Fraction, exact: Fraction | int) -> bool:
    """Whether a decimal of at least four significant digits is `exact`, rounded to as many decimals.

    Only a value that no finite decimal can show may be approximated: 0.3333 is 1/3, but 12.5 is not 12.4999.

    >>> approximates(Fraction("0.3333"), Fraction(1, 3)), approximates(Fraction("0.33"), Fraction(1, 3))
    (True, False)
    """
    decimals = decimals_of(Fraction(shown))
    if decimals is None or decimals_of(Fraction(exact)) is not None:
        return False
    scaled = Fraction(shown) * 10**decimals
    return bool(abs(scaled) >= 1000 and abs(Fraction(exact) * 10**decimals - scaled) <= Fraction(1, 2))


def decimals_of(value: Fraction) -> int | None:
    """Fewest decimals that show `value` exactly; None if no finite number does."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None
