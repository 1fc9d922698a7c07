"""docs/algorithms.md: its code is the source's, its tests exist, and no row is missing. Run this file to renew it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from llm_gym.harness.algorithms import importance_sampling, kl, losses, normalisers
from llm_gym.harness.algorithms.advantages import ADVANTAGES
from llm_gym.harness.algorithms.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "algorithms.md"
BLOCK = re.compile(r"<!-- code: (\w+)\.(\w+) -->\n(?:```python\n.*?```\n)?", re.DOTALL)
"""A marker, and the code below it if there is some."""


def code(module: str, name: str) -> str:
    """A function's source without its docstring."""
    source = (ROOT / "llm_gym" / "harness" / "algorithms" / f"{module}.py").read_text(encoding="utf-8")
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        note = node.body[0]
        assert note.end_lineno is not None
        del lines[note.lineno - node.lineno : note.end_lineno - node.lineno + 1]
    return "\n".join(lines)


def renewed(text: str) -> str:
    """The page with the code as it is now."""
    return BLOCK.sub(lambda m: f"<!-- code: {m[1]}.{m[2]} -->\n```python\n{code(m[1], m[2])}\n```\n", text)


def test_the_code_is_that_of_the_source() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text) == text, f"run `python tests/{Path(__file__).name}`"


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)


@pytest.mark.parametrize("table", [ADVANTAGES, losses.LOSSES, normalisers.NORMALISERS])
def test_every_row_has_a_section(table: dict[str, object]) -> None:
    headings = re.findall(r"^### `(\w+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(table) - set(headings) == set(), f"want a section `### name` of each in {PAGE.name}"
    assert all(inspect.isfunction(row) for row in table.values())


def test_every_preset_is_in_the_table_with_its_numbers() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        loss = preset["loss"]
        assert cells[1:3] == [f"`{preset['advantage']}`", f"`{loss['name']}`"]
        assert cells[4] == f"`{loss['normaliser']}`"
        if "clip_low" in loss:
            assert [float(x) for x in cells[3].split(",")] == [loss["clip_low"], loss["clip_high"]]
    for row in (*kl.KL, *importance_sampling.CORRECTIONS):
        assert f"`{row}`" in text


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
