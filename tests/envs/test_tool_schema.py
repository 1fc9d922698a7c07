"""Schemas of Python functions, and arguments checked against schemas."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.envs.tools.schema import check_arguments, function_schema
from llm_gym.errors import ConfigError


def search(
    query: str,
    limit: int = 10,
    where: Literal["web", "news"] = "web",
    weights: dict[str, float] | None = None,
    tags: list[str] | None = None,
) -> list[str]:
    """Looks something up,
    as one does.

    Not part of the description.

    Args:
        query: what to look for:
            a few words.
        limit (int): most results.

    Returns:
        Titles.
    """
    raise NotImplementedError


def test_the_schema_of_a_function() -> None:
    number_or_null = {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
    assert function_schema(search) == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Looks something up, as one does.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "what to look for: a few words."},
                    "limit": {"type": "integer", "description": "most results.", "default": 10},
                    "where": {"enum": ["web", "news"], "type": "string", "default": "web"},
                    "weights": number_or_null,
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                "required": ["query"],
            },
        },
    }


def test_it_agrees_with_transformers_where_both_have_words() -> None:
    from transformers.utils import get_json_schema

    def add(a: int, b: float, note: str) -> float:
        """Adds.

        Args:
            a: one
            b: another
            note: a remark
        """
        raise NotImplementedError

    theirs = get_json_schema(add)
    assert theirs["function"].pop("return") == {"type": "number"}, "which no template shows"
    assert function_schema(add) == theirs


def test_types_that_json_has_no_word_for() -> None:
    def odd(a: set[int]) -> None: ...

    def many(*values: int) -> None: ...

    with pytest.raises(ConfigError, match=r"argument 'a' of odd\(\) has the type set\[int\]"):
        function_schema(odd)
    with pytest.raises(ConfigError, match=r"argument 'values' of many\(\) needs a type"):
        function_schema(many)


def check(value: Any, **schema: Any) -> tuple[Any, list[str]]:
    """One argument `x` of the given schema."""
    found, wrong = check_arguments({"x": value}, {"properties": {"x": schema}})
    return found["x"], wrong


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("3", {"type": "integer"}, 3),
        ("3.0", {"type": "integer"}, 3),
        (3.0, {"type": "integer"}, 3),
        ("2.5", {"type": "number"}, 2.5),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("null", {"type": ["integer", "null"]}, None),
        ('["a"]', {"type": "array", "items": {"type": "string"}}, ["a"]),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("3", {"type": ["string", "integer"]}, "3"),
        ("3", {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3"),
        ("3", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 3),
        (None, {"type": "string", "nullable": True}, None),
        (["1", 2], {"type": "array", "items": {"type": "integer"}}, [1, 2]),
        ({"n": {"k": "1"}}, {"properties": {"n": {"properties": {"k": {"type": "integer"}}}}}, {"n": {"k": 1}}),
        ("a\ud800", {"type": "string"}, "a\ufffd"),
        ({"anything": [1]}, {}, {"anything": [1]}),
    ],
)
def test_safe_conversions(value: Any, schema: dict[str, Any], expected: Any) -> None:
    found, wrong = check(value, **schema)
    assert wrong == []
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "schema", "words"),
    [
        (3, {"type": "string"}, "the argument 'x' must be a string, got 3"),
        ("three", {"type": "integer"}, "must be an integer, got \"three\""),
        ("3.5", {"type": "integer"}, "must be an integer"),
        (True, {"type": "integer"}, "must be an integer, got true"),
        (1, {"type": "boolean"}, "must be a boolean, got 1"),
        ("a", {"type": ["integer", "null"]}, "must be an integer or null"),
        ("red", {"enum": ["green", "blue"]}, 'must be one of ["green", "blue"], got "red"'),
        (0, {"type": "integer", "minimum": 1}, "must be at least 1, got 0"),
        (9, {"type": "integer", "exclusiveMaximum": 9}, "must be less than 9"),
        ([], {"type": "array", "minItems": 1}, "at least as many items as 1"),
        ("abc", {"type": "string", "maxLength": 2}, "a length of at most 2"),
        (["a"], {"type": "array", "items": {"type": "integer"}}, "the argument 'x'[0] must be an integer"),
        ({"a": 1}, {"type": "object", "required": ["b"]}, "the argument 'x'.b is missing"),
        ({"a": 1}, {"properties": {"b": {}}, "additionalProperties": False}, "there is no argument 'x'.a (valid: b)"),
        ("a", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 'must be one of: {"type": "integer"}; {"type": "null"}'),
        ("NaN", {"type": "number"}, "must be a number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(value: Any, schema: dict[str, Any], words: str) -> None:
    _, wrong = check(value, **schema)
    assert len(wrong) == 1
    assert words in wrong[0]


def test_everything_wrong_is_said_at_once() -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a", "b"]}
    _, wrong = check_arguments({"a": "x", "c": 1}, schema)
    assert len(wrong) == 3


def test_a_suggestion_has_one_end() -> None:
    """Other mistakes, or a full stop, go on behind it."""
    _, wrong = check_arguments({"quary": "a"}, {"properties": {"query": {"type": "string"}}, "required": ["query"]})
    assert wrong == ["the argument 'query' is missing", "there is no argument 'quary' (did you mean 'query'?)"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
schemas = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object", "odd"]),
            "enum": st.lists(json_values, max_size=2),
            "minimum": st.integers(-3, 3),
            "maxItems": st.integers(0, 2),
        },
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"properties": st.dictionaries(st.text(max_size=3), inner, max_size=2)}),
    ),
    max_leaves=4,
)


@given(value=json_values, schema=schemas)
def test_checked_once_or_twice_is_the_same(value: Any, schema: dict[str, Any]) -> None:
    """Whatever passes is final: checking what came out passes again and changes nothing."""
    found, wrong = check(value, **schema)
    if not wrong:
        assert check(found, **schema) == (found, [])


@given(value=json_values, schema=schemas)
def test_what_jsonschema_accepts_is_accepted_unchanged(value: Any, schema: dict[str, Any]) -> None:
    import jsonschema

    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError:
        return
    except jsonschema.SchemaError:
        return
    except jsonschema.exceptions.UnknownType:
        return
    found, wrong = check(value, **schema)
    assert wrong == []
    assert found == value
