"""What keeps the house readable: files and functions of a length that fits in a head. Imports: import-linter."""

from __future__ import annotations

import ast
import doctest
import functools
import gc
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


@functools.cache
def parsed(source: str) -> ast.Module:
    """Its tree. A collection of garbage in the middle may run code that parses too (https://github.com/python/cpython/
    issues/106905), as it did once in a process that had run other tests."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def test_no_file_is_too_long() -> None:
    lengths = {name: len(source.splitlines()) for name, source in sources().items()}
    assert len(lengths) > 100
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


def test_no_function_is_too_long() -> None:
    long = []
    for name, source in sources().items():
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                long += [f"{name}:{node.name} {lines}"] if lines > LINES_OF_A_FUNCTION else []
    assert long == []


OTHERS = {
    "_exit",  # os
    "_current_frames",  # sys
    "_started",  # threading.Thread
    "_session",  # pytest's reporter
    "_attn_implementation",  # transformers' configurations
    "_model_mapping",  # transformers' auto classes
    "_adapter_manager",  # vLLM's worker
}
"""Private names of others that tests use, because these have no public ones."""


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in OTHERS


def private_names(source: str) -> list[str]:
    """`line: name` of every private name that is imported, is an attribute of another object, or is patched there."""
    found = []
    for node in ast.walk(parsed(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_gym"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for a in node.names if a.name.startswith("llm_gym") for part in a.name.split(".")]
        elif isinstance(node, ast.Attribute):
            of = node.value.func if isinstance(node.value, ast.Call) else node.value
            names = [] if isinstance(of, ast.Name) and of.id in ("self", "cls", "super") else [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in PATCHES:
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [part for text in texts for part in text.split(".") if part.isidentifier()]
        found += [f"{node.lineno}: {name}" for name in names if private(name)]
    return found


PATCHES = ("setattr", "delattr", "getattr", "hasattr", "patch", "attrgetter")


def test_tests_use_public_names_alone() -> None:
    """What a test cannot reach by a public name is no promise to anybody; it may change without breaking a test."""
    tests = Path(__file__).parent
    found = {str(f.relative_to(tests)): private_names(f.read_text("utf-8")) for f in sorted(tests.rglob("*.py"))}
    assert len(found) > 100
    assert {file: names for file, names in found.items() if names} == {}


def test_a_private_name_is_found_however_it_is_reached() -> None:
    for line in (
        "from llm_gym.cli.train import _line",
        "from llm_gym._hidden import x",
        "import llm_gym._hidden",
        "policy._engine.slots",
        "make()._rows",
        "monkeypatch.setattr(module, '_step', None)",
        "monkeypatch.setattr('llm_gym.hub._offline', None)",
        "getattr(env, '_rows')",
    ):
        assert len(private_names(line)) == 1, line
    for line in ("self._x", "os._exit(1)", "x.__class__", "from numpy import _core", "_own = 1", "super()._x()"):
        assert private_names(line) == [], line


def test_every_folder_says_what_it_is() -> None:
    """In the first line of its `__init__.py`, which a reader opens first."""
    for name, source in sources().items():
        if name.endswith("__init__.py"):
            assert ast.get_docstring(parsed(source)), name


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
    told = dict(pair for name, source in sources().items() for pair in public(parsed(source), name))
    assert len(told) > 1500
    openings = {name: (text or "").split("\n\n")[0] for name, text in told.items()}
    assert [name for name, opening in openings.items() if not opening.endswith((".", ":", "?"))] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_person_meets_first_has_an_example_that_runs(name: str) -> None:
    """The examples themselves are run by `pytest --doctest-modules llm_gym`."""
    module, _, attribute = name.partition(":")
    thing = getattr(importlib.import_module(module), attribute)
    assert doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
