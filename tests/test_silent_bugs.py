"""The table of planted bugs fits the source: each bug can be planted, and its test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutations import LATER, MUTANTS, Mutant
from mutations_of_loops import LOOPS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", [*MUTANTS, *LOOPS], ids=lambda mutant: mutant.bug)
def test_the_bug_can_be_planted_and_has_a_test(mutant: Mutant) -> None:
    source = (ROOT / "llm_gym" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
    for test in mutant.tests:
        file, *_, name = re.sub(r"\[.*", "", test).split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_no_bug_is_listed_twice() -> None:
    names = [mutant.bug for mutant in (*MUTANTS, *LOOPS)]
    assert len({*names, *LATER}) == len(names) + len(LATER)
