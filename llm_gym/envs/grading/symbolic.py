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
from llm_gym.envs.grading.numbers import computed

DIGITS = 100
"""Digits to which a difference is computed, beyond those of the values themselves."""
ZERO = sympy.Float("1e-60")
"""A difference this small, relative to values below 1 and absolute above, is none."""
MAX_DIGITS = 4000
"""Most digits of a value: a larger one is not read."""
POINTS = 8
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


def is_rational(text: str) -> bool:
    """Whether a single value is a rational number, of at most `MAX_DIGITS` digits."""
    value = expression(text)
    if value is None or value.free_symbols:
        return False
    value = sympy.nsimplify(value) if value.is_Float else sympy.simplify(value)
    return bool(value.is_Rational)


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
    """Whether both have the same value where both are real (or where both have one, if they never are real).

    None if there are too few such points.
    """
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    needed = _MIN_POINTS if symbols else 1
    seen: dict[bool, list[bool]] = {True: [], False: []}
    for point in range(POINTS if symbols else 1):
        found = _difference(a, b, {s: _coordinate(point, i) for i, s in enumerate(symbols)})
        if found is None:
            continue
        real, differ = found
        if real and differ:
            return False
        seen[real].append(differ)
    if len(seen[True]) >= needed:
        return True
    return not any(seen[False]) if len(seen[True]) + len(seen[False]) >= needed else None


def _difference(a: Any, b: Any, at: dict[Any, Any]) -> tuple[bool, bool] | None:
    """(both are real, they differ) at a point; None if one of them has no finite value there."""
    values = [value.evalf(15, subs=at) for value in (a, b)]
    sizes = [abs(value) for value in values]
    if not all(size.is_number and size.is_finite for size in sizes):
        return None
    real = all(value.is_real is not False for value in values)
    size = max(sizes)
    if size == 0:
        return real, False
    digits = DIGITS + abs(int(sympy.log(size, 10).evalf(5)))
    if digits > MAX_DIGITS:
        return None if a != b else (real, False)
    return real, bool(abs((a - b).evalf(15, subs=at, maxn=digits)) > ZERO * min(1, size))


def _coordinate(point: int, index: int) -> Any:
    """A fixed, odd-looking rational, no special point: all positive at the first ones, then of changing signs."""
    numerator = (7919 * (point + 1) + 104729 * (index + 1)) % 9973 + 311
    return sympy.Rational(numerator if point < _MIN_POINTS or (point >> index % 3) % 2 else -numerator, 3989)


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
    if not real.is_real:
        return False
    digits = Fraction(int(sympy.floor(real * 10 ** (places + 20))), 10 ** (places + 20))
    return abs(digits - value) * 10**places <= Fraction(1, 2) or computed(value, digits)
