"""What keeps the house readable: files and functions of a length that fits in a head. Imports: import-linter."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm_gym

PACKAGE = Path(llm_gym.__file__).parent
LINES, LINES_OF_A_FUNCTION = 400, 60


def sources() -> dict[str, str]:
    return {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}


def test_no_file_is_too_long() -> None:
    lengths = {name: len(source.splitlines()) for name, source in sources().items()}
    assert len(lengths) > 100
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


def test_no_function_is_too_long() -> None:
    long = []
    for name, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                long += [f"{name}:{node.name} {lines}"] if lines > LINES_OF_A_FUNCTION else []
    assert long == []


def test_every_folder_says_what_it_is() -> None:
    """In the first line of its `__init__.py`, which a reader opens first."""
    for name, source in sources().items():
        if name.endswith("__init__.py"):
            assert ast.get_docstring(ast.parse(source)), name


EXAMPLES = (
    "llm_gym.harness:Trainer", "llm_gym.harness.learner:Learner", "llm_gym.rollouts.driver:Driver", "llm_gym:rollout",
    "llm_gym:make_policy", "llm_gym:TextEnv", "llm_gym.envs.tools:ToolEnv", "llm_gym.envs.grading:verify",
    "llm_gym:Tokens", "llm_gym:register", "llm_gym.harness:Observer",
)  # fmt: skip
"""What a person meets first."""


def public(node: ast.AST, name: str) -> Iterator[tuple[str, str | None]]:
    """A module's or class's name and docstring, and those of what it holds that others may call."""
    yield name, ast.get_docstring(node)  # type: ignore[arg-type]
    for inner in getattr(node, "body", ()):
        if getattr(inner, "name", "_").startswith("_") or "overload" in map(ast.unparse, inner.decorator_list):
            continue
        if isinstance(inner, ast.ClassDef):
            yield from public(inner, f"{name}:{inner.name}")
        else:
            yield f"{name}:{inner.name}", ast.get_docstring(inner)


def test_everything_public_says_what_it_is_in_a_sentence() -> None:
    told = dict(pair for name, source in sources().items() for pair in public(ast.parse(source), name))
    assert len(told) > 1500
    openings = {name: (text or "").split("\n\n")[0] for name, text in told.items()}
    assert [name for name, opening in openings.items() if not opening.endswith((".", ":", "?"))] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_person_meets_first_has_an_example_that_runs(name: str) -> None:
    """The examples themselves are run by `pytest --doctest-modules llm_gym`."""
    module, _, attribute = name.partition(":")
    thing = getattr(importlib.import_module(module), attribute)
    assert doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
