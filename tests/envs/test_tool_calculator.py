"""Arithmetic from text, checked against Python's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.envs.tools.calculator import evaluate

numbers = st.integers(0, 10**12).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", " + ", " - ", " * "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=8,
)


@given(expression=expressions)
def test_whole_numbers_are_exact(expression: str) -> None:
    assert evaluate(expression) == eval(expression)


@given(a=st.integers(-99, 99), b=st.integers(1, 99), c=st.integers(0, 5))
def test_division_and_powers(a: int, b: int, c: int) -> None:
    assert evaluate(f"{a}/{b}") == a / b
    assert isinstance(evaluate(f"{a * b}/{b}"), int)
    assert evaluate(f"{a}//{b}") == a // b
    assert evaluate(f"{a} % {b}") == a % b
    assert evaluate(f"-{b}**{c}") == -(b**c)
    assert evaluate(f"{b}^-{c}") == b**-c
    assert evaluate(f"2**{c}**2") == 2 ** (c**2)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "want a number, but the text ends"),
        ("2+", "want a number, but the text ends"),
        ("2 3", "want an operator, got '3'"),
        ("(2", "a parenthesis is not closed"),
        ("2*)", r"want a number, got '\)'"),
        ("import os", "cannot read 'import os'"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("9**9**9", "too large"),
        ("10**999*10**999", "too large"),
        ("1e308*10", "not a finite number"),
        ("2.0**99999", "too large"),
        ("1e999", "not a finite number"),
        ("(-8)**.5", "root of a negative number"),
        ("(" * 1000, "more than 50 levels"),
        ("2**" * 600 + "2", "more than 50 levels"),
        ("1" * 1500, "too large"),
        ("1+" * 1500 + "1", "3001 characters"),
    ],
)
def test_what_it_refuses(expression: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(expression)


@given(text=st.text(st.sampled_from("0123456789.+-*/%^() e"), max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    try:
        value = evaluate(text)
    except ValueError as error:
        assert str(error).endswith(".")
    else:
        assert value == value
