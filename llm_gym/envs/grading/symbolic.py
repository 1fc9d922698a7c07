"""Whether two expressions are the same value: parsed by math-verify, compared at points to many digits.

Two expressions in variables are equal if they agree at several random points (Schwartz-Zippel for
the polynomial case, https://en.wikipedia.org/wiki/Schwartz-Zippel_lemma), negative ones included, so
that `|x|` is not `x`. Only the grading worker imports this.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig  # type: ignore[import-untyped]
from math_verify import parse as math_verify_parse

from llm_gym.envs.grading.latex import exact_decimals

DIGITS = 100
"""Digits to which a difference is computed, beyond those of the values themselves."""
ZERO = sympy.Float("1e-60")
"""A difference this small, relative to values below 1 and absolute above, is none."""
MAX_DIGITS = 4000
"""Most digits of a value: a larger one is not read."""
POINTS = 6
"""Random points at which two expressions must agree."""
_MIN_POINTS = 3
_CONFIG = (
    LatexExtractionConfig(
        boxed_match_priority=-1,
        # `units` would turn 5t into 5.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    ),
)
_UNFINISHED = (
    sympy.Sum,
    sympy.Product,
    sympy.Integral,
    sympy.Limit,
    sympy.Derivative,
    sympy.core.function.AppliedUndef,
)
"""What has no value at a point: unknown functions, and sums of symbolic length."""
_LETTERS = re.compile(r"\\[a-zA-Z]+|([a-zA-Z])")


@lru_cache(maxsize=512)
def expression(text: str) -> Any | None:
    """The sympy expression of a single value in LaTeX; None if it cannot be read."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", r"\\cdot\\cdot ", exact_decimals(text))  # "3 4" is no number
    text = text.replace("°", r"\cdot \frac{\pi}{180}")
    found = math_verify_parse(f"${text}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    value = found[0] if found else None
    if not isinstance(value, sympy.Expr) or value.has(sympy.nan, sympy.zoo):
        return None
    return value.xreplace({s: sympy.I for s in value.free_symbols if s.name == "i"})


def same(gold: str, answer: str) -> bool | None:
    """Whether two single values are equal; None if one of them cannot be read."""
    a, b = expression(gold), expression(answer)
    if a is None or b is None:
        return None
    if _letters_differ(gold, answer):
        return False
    return equal(a, b)


def _letters_differ(a: str, b: str) -> bool:
    """Whether the same letter is upper case in one and lower case in the other (math-verify reads them as one)."""
    one, two = ({m[1] for m in _LETTERS.finditer(text) if m[1]} - {"e", "E"} for text in (a, b))
    return any(c not in two and c.swapcase() in two and c.swapcase() not in one for c in one)


def equal(a: Any, b: Any) -> bool:
    """Whether two sympy expressions have the same value wherever both have one."""
    if a == b:
        return True
    if a.is_infinite or b.is_infinite:
        return False
    unfinished = any(e.has(*_UNFINISHED) and e.free_symbols for e in (a, b))
    verdict = None if unfinished else _agree(a, b)
    return bool(sympy.simplify(a - b) == 0) if verdict is None else verdict


def ratio(a: Any, b: Any) -> Any | None:
    """The constant c with a = c b; None if there is none (or it is 0)."""
    quotient = sympy.simplify(a / b)
    return quotient if quotient.is_number and quotient.is_finite and quotient != 0 else None


def _agree(a: Any, b: Any) -> bool | None:
    """Whether both have the same value at every point where they have one; None if too few such points."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    seen = 0
    for point in range(POINTS if symbols else 1):
        at = {s: _coordinate(point, i) for i, s in enumerate(symbols)}
        difference = _difference(a, b, at)
        if difference is None:
            continue
        if difference:
            return False
        seen += 1
    return True if seen >= (_MIN_POINTS if symbols else 1) else None


def _difference(a: Any, b: Any, at: dict[Any, Any]) -> bool | None:
    """Whether two values differ at a point; None if one of them has no finite value there."""
    sizes = [abs(value.evalf(15, subs=at)) for value in (a, b)]
    if not all(size.is_number and size.is_finite for size in sizes):
        return None
    size = max(sizes)
    if size == 0:
        return False
    digits = DIGITS + abs(int(sympy.log(size, 10).evalf(5)))
    if digits > MAX_DIGITS:
        return None if a != b else False
    return bool(abs((a - b).evalf(15, subs=at, maxn=digits)) > ZERO * min(1, size))


def _coordinate(point: int, index: int) -> Any:
    """A fixed, odd-looking rational: positive and negative ones, no special points."""
    numerator = (7919 * (point + 1) + 104729 * (index + 1)) % 9973 + 311
    return sympy.Rational(numerator if (point + index) % 2 else -numerator, 3989)


def decimal(text: str) -> Fraction | None:
    """The exact value of a decimal with a point, `-2.6667`; None for anything else."""
    return Fraction(text) if re.fullmatch(r"[-+]?\d*\.\d+", text) else None


def rounds_to(exact: str, shown: str) -> bool:
    """Whether `shown` is a decimal of >= 4 significant digits and `exact`, no decimal, rounds to it."""
    value, expr = decimal(shown), expression(exact)
    if value is None or expr is None or decimal(exact) is not None or expr.free_symbols or expr.is_Integer:
        return False
    places = len(shown.partition(".")[2])
    if abs(value) * 10**places < 1000:
        return False
    real = sympy.N(expr, 30 + places)
    return bool(real.is_real and abs(real - sympy.Rational(value)) * 10**places <= sympy.Rational(1, 2))
