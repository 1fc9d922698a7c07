"""Arithmetic from text, without `eval`: whole numbers exactly, everything bounded."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

Number = int | float
MOST_CHARACTERS = 2000
MOST_DIGITS = 1000
DEEPEST = 50

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)|(\*\*|//|[-+*/%^()]))")
_SUMS: dict[str, Callable[[Number, Number], Number]] = {"+": operator.add, "-": operator.sub}
_PRODUCTS: dict[str, Callable[[Number, Number], Number]] = {
    "*": operator.mul,
    "/": lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b,
    "//": operator.floordiv,
    "%": operator.mod,
}


def evaluate(expression: str) -> Number:
    """The value of an expression of numbers, `+ - * / // % ** ^` and parentheses.

    >>> evaluate("1234*5678"), evaluate("(7+4)/4"), evaluate("-2**2"), evaluate("6 / 3")
    (7006652, 2.75, -4, 2)

    Raises:
        ValueError: it is no such expression, or its value is not finite or has too many digits; a sentence.
    """
    if len(expression) > MOST_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, at most {MOST_CHARACTERS} are read.")
    try:
        return _Parser(_tokens(expression)).whole()
    except ZeroDivisionError:
        raise ValueError("division by zero.") from None
    except OverflowError:
        raise ValueError("the result is too large.") from None


def _tokens(expression: str) -> list[str]:
    found, at = [], 0
    text = expression.rstrip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"cannot read {text[at : at + 10].strip()!r}; use numbers, + - * / // % ** and ( ).")
        found.append(token[1] or token[2])
        at = token.end()
    return found


class _Parser:
    """Precedence climbing; `at` is the next token."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def whole(self) -> Number:
        value = self.sum()
        if self.at < len(self.tokens):
            raise ValueError(f"want an operator, got {self.tokens[self.at]!r}.")
        return value

    def sum(self) -> Number:
        return self.chain(self.product, _SUMS)

    def product(self) -> Number:
        return self.chain(self.signed, _PRODUCTS)

    def chain(self, part: Callable[[], Number], operations: dict[str, Callable[[Number, Number], Number]]) -> Number:
        value = part()
        while (sign := self.peek()) in operations:
            self.at += 1
            value = _bounded(operations[sign](value, part()))
        return value

    def signed(self) -> Number:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.tokens[self.at] == "-" else sign
            self.at += 1
        return sign * self.power()

    def power(self) -> Number:
        base = self.atom()
        if self.peek() not in ("**", "^"):
            return base
        self.at += 1
        with_sign = self.nested(self.signed)
        if isinstance(base, int) and abs(base) > 1 and abs(with_sign) * len(str(abs(base))) > MOST_DIGITS:
            raise ValueError("the result is too large.")
        value = base**with_sign
        if isinstance(value, complex):
            raise ValueError("a root of a negative number.")
        return _bounded(value)

    def atom(self) -> Number:
        token = self.peek()
        self.at += 1
        if token == "(":
            value = self.nested(self.sum)
            if self.peek() != ")":
                raise ValueError("a parenthesis is not closed.")
            self.at += 1
            return value
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise ValueError(f"want a number, got {token!r}." if token else "want a number, but the text ends.")
        return _bounded(int(token) if token.isdigit() else float(token))

    def nested(self, part: Callable[[], Number]) -> Number:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels of parentheses.")
        value = part()
        self.depth -= 1
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""


def _bounded(value: Number) -> Number:
    """The value, if it is finite and of a bounded size."""
    if isinstance(value, int):
        if value.bit_length() > MOST_DIGITS * 10 // 3:
            raise ValueError("the result is too large.")
    elif value != value or value in (float("inf"), float("-inf")):
        raise ValueError("the result is not a finite number.")
    return value
