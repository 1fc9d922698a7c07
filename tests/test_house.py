"""What keeps the house readable: files and functions of a length that fits in a head. Imports: import-linter."""

from __future__ import annotations

import ast
from pathlib import Path

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
