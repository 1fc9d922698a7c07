"""Agreement with the labels of other suites: the table of docs/grading.md is complete and true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("grading_benchmark", ROOT / "benchmarks" / "grading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_disagreement_is_listed_with_its_reason_and_none_is_a_false_positive(shared, benchmark):
    folder = shared("data/grader")
    found = benchmark.disagreements(folder)
    assert [case for _, case, _ in found if not case["equal"]] == []
    listed = (ROOT / "docs" / "grading.md").read_text(encoding="utf-8")
    for name, case, grade in found:
        row = f"| {name} | `{benchmark.short(case['gold'])}` | `{benchmark.short(case['pred'])}` | equal |"
        assert f"{row} {grade.status} | " in listed
    cases = sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))
    assert cases == 5683
    assert len(found) < 0.01 * cases
