"""Six random configurations of every loop; `make soak` has hundreds (benchmarks/random_runs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_configurations import check, draw

FIRST = 2000
COUNT = 6


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
@pytest.mark.filterwarnings("ignore")
def test_what_must_hold_of_every_configuration(seed: int, tmp_path: Path) -> None:
    """See `random_configurations`; one that is refused says why, in an error of this project."""
    drawn = draw(seed)
    outcome = check(drawn, tmp_path, looks=("budget",) if seed % 2 else ("rewards",))
    assert outcome == "ran" or ": " in outcome, f"{drawn}\n{outcome}"
