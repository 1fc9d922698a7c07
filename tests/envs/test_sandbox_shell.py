"""What models write besides Python (`!cmd`, `%cd`, `%pip`), and cells that are hard on their own shell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sandbox_tiers import BACKENDS, ONE_OF_EACH

from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import PythonSession

CASES = [json.loads(line) for line in Path(__file__).with_name("python_cells.jsonl").open()]
"""Each has `cells` of one session; what the last one says (a regular expression), its status if not `ok`, and perhaps
most lines of it, what every cell says, and the `seconds` of a cell that may never answer (120)."""


@pytest.fixture(scope="module", autouse=True)
def _end() -> Iterator[None]:
    yield
    sandbox.shutdown()


def wrong(case: dict[str, Any], tier: str, backend: str) -> str:
    """What is not as written beside the cells."""
    with PythonSession(backend, tier) as session:
        results = [session.run(cell, timeout=case.get("seconds", 120)) for cell in case["cells"]]
    last = results[-1]
    good = bool(re.search(case["says"], last.output, re.DOTALL)) and last.status == case.get("status", "ok")
    good = good and last.output.count("\n") <= case.get("lines", 1 << 20)
    good = good and all(re.search(case.get("every", ""), result.output, re.DOTALL) for result in results)
    return "" if good else f"{case['name']}: {[(r.status, r.output[:400], r.output[-400:]) for r in results]}"


def pairs() -> Iterator[Any]:
    """(tier, backend); CI has each tier and each backend once."""
    for number, tier in enumerate(ONE_OF_EACH):
        for other, backend in enumerate(BACKENDS):
            marks = [*tier.marks, *([] if number == other else [pytest.mark.soak])]
            yield pytest.param(*tier.values, backend, marks=marks, id=f"{tier.id}-{backend}")


@pytest.mark.parametrize(("tier", "backend"), list(pairs()))
def test_every_cell_says_what_it_should(tier: str, backend: str) -> None:
    found = [words for case in CASES if (words := wrong(case, tier, backend))]
    assert not found, "\n".join(found)
