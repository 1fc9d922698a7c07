"""Exact numbers in running text: commas, currency, signs, decimals, fractions, mixed numbers, percent.

A number is accepted only whole: `12.5` never yields 12 and `5abc` never yields 5. Values are exact
(`fractions.Fraction` or `int`), so `12.0 == 12` and `1/2 == 0.5`, with no rounding anywhere but in `near`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from llm_gym.envs.grading.symbols import ascii_mathematics

MAX_DIGITS = 400
"""A longer run of digits is no answer (and could be made to cost quadratic time)."""

PRECISION = Fraction(1, 2**50)
"""Relative error of a value computed in double precision: a unit in the last place is 2^-52, and a few may add up."""
MAX_GAP = Fraction(1, 10**6)
"""And its largest absolute error: beyond, digits of the whole part would be wrong."""

_CURRENCY = r"[$€£¥₹]"
_UNSIGNED = r"(?:(?!0,)\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""
    (?<![\w.,/^*{{])(?<!\d:)(?<![\w)\]]-)(?<![\w)\]]\+)   # not glued to a word, no term, no minutes
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
    (re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])|\\(?:left|right)(?![a-zA-Z])\.?"), ""),
    (re.compile(r"(?<=\d)(?:\\[,;!]|,\\!|\s?\{,\s?\})\s?(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[,;:! ]|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?=[$%])|\\[()\[\]]"), ""),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])"), "°"),
    (
        re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))"),
        r"e\1\2",
    ),
    (re.compile(r"(?<=\d)_\s*(?:\{\(?\s*10\s*\)?\}|\{\s*ten\s*\}|10(?!\d))"), ""),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|`"), " "),
    (re.compile(r"(?<=[A-Za-z])\$|\$(?!\s?[-+]?[\d.])"), " "),
)
_GLUED_UNIT = re.compile(r"(?<=\d)(?:[kcm]?m[²³]|(?:[kcm]m|kg|mg|ml|ft|mph)[²³]?)(?!\w)")
SPACED = re.compile(r"[-+]?[1-9]\d{0,2}(?: \d{3})+")
"""Thousands set apart by spaces."""
_MARKUP = re.compile(r"[\\*_`${^]")
_REPEATING = re.compile(
    r"(?<![\w.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\)|(\d)\u0305)(?:(\d*)\\dot\s*(?:\{(\d)\}|(\d)))?"
    r"(?![\d(])"
)

_PERIOD = re.compile(r"\.\d*(?:\\[obd]|\(\d|\d\u0305)")
"""Finds whether there is any, in a fraction of the time."""


def repeating(text: str, form: str) -> str:
    r"""Every repeating decimal (`0.1\overline{36}`, `0.\dot{1}2\dot{3}`, `0.(6)`) as the fraction it is.

    >>> repeating(r"x = 0.\overline{6}", "{}/{}")
    'x = 2/3'
    """

    def fraction(match: re.Match[str]) -> str:
        whole, fixed, middle = match[1], match[2], match[7] or ""
        period = (match[3] or match[4] or match[5] or match[6]) + middle + (match[8] or match[9] or "")
        if len(whole + fixed + period) > MAX_DIGITS:
            return match[0]
        value = int(whole + fixed + period) - int(whole + fixed or 0)
        exact = Fraction(value, (10 ** len(period) - 1) * 10 ** len(fixed))
        return form.format(exact.numerator, exact.denominator)

    return _REPEATING.sub(fraction, text) if _PERIOD.search(text) else text


def plain(text: str) -> str:
    """Text with digits of any script, Unicode signs, Markdown, simple LaTeX and glued units reduced to ASCII."""
    text = _GLUED_UNIT.sub("", text)
    if not text.isascii():
        text = ascii_mathematics(text)
    text = repeating(text, "{}/{}")
    if _MARKUP.search(text):
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return text


class Undone(Fraction):
    """A fraction that is not in lowest terms, as `21/3` or `7/1`: a division left to the reader."""


def number(match: re.Match[str]) -> int | Fraction | None:
    """The exact value of a `NUMBER` match; None for a zero denominator, a division of decimals, two
    signs or too many digits.
    """
    sign, inner, digits, whole = match.group("sign", "inner", "value", "whole")
    over, power = match.group("over", "power")
    if (sign and inner) or max(map(len, (digits, over or "", whole or ""))) > MAX_DIGITS:
        return None
    digits, undone = digits.replace(",", ""), False
    value: int | Fraction = Fraction(digits) if "." in digits else int(digits)
    if over is not None:
        if int(over) == 0 or "." in digits:
            return None
        part = Fraction(value) / int(over)
        undone = part.denominator != int(over) or int(over) == 1
        value = part + int(whole or 0)
    elif power is not None:
        value = value * Fraction(10) ** int(power)
    value = -value if "-" in (sign, inner) else value
    return Undone(value) if undone else value


def parse(text: str) -> int | Fraction | None:
    """The value of a text that is one number and nothing else; None if it is not.

    >>> parse("$1,234.50"), parse("-7"), parse("12.0"), parse("2 1/2"), parse("5abc"), parse("1,00")
    (Fraction(2469, 2), -7, Fraction(12, 1), Fraction(5, 2), None, None)
    """
    text = plain(text).strip().rstrip(".%").strip()
    if SPACED.fullmatch(text):
        text = text.replace(" ", "")
    match = NUMBER.match(text)
    return number(match) if match is not None and match.end() == len(text) else None


def near(a: int | Fraction, b: int | Fraction) -> bool:
    """Whether one of two numbers that differ is the other as a decimal, rounded or computed in double precision."""
    if isinstance(a, int) and isinstance(b, int):
        return False
    return any(approximates(x, y) or computed(x, y) for x, y in ((a, b), (b, a)))


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


def computed(shown: int | Fraction, exact: int | Fraction) -> bool:
    """Whether a decimal is `exact` as a computer prints it: at most 17 digits, right but for a few last bits.

    >>> [computed(Fraction(shown), Fraction("0.3")) for shown in ("0.30000000000000004", "0.3000000000001")]
    [True, False]
    """
    gap = abs(Fraction(shown) - exact)
    if gap > min(abs(Fraction(exact)) * PRECISION, MAX_GAP):
        return False
    decimals = decimals_of(Fraction(shown)) or 0
    return bool(decimals > 0 and abs(Fraction(shown)) * 10**decimals < 10**17)


def decimals_of(value: Fraction) -> int | None:
    """Fewest decimals that show `value` exactly; None if no finite number does."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None
