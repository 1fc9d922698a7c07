"""Every numbered example runs to its end, as a script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("0*.py"))
SOAK = ("09_same_environment_in_trl",)
"""Half a minute, and tests/export/test_trl.py has the same in a few steps."""


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.soak] if path.stem in SOAK else []) for path in EXAMPLES],
)
def test_it_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


@pytest.mark.parametrize(("steps", "gain"), [(3, -1.0), pytest.param(15, 0.1, marks=pytest.mark.soak)])
def test_grpo_in_one_file_learns(steps: int, gain: float) -> None:
    """A few of its steps, in the soak a quarter: unseen sums that the embedded model gets right by greedy play."""
    script = EXAMPLES[0].parent / "grpo_single_file.py"
    done = subprocess.run([sys.executable, script, "--steps", str(steps)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (float(number) for number in re.findall(r"greedy ([\d.]+)", done.stdout))
    assert after > before + gain
    assert len(script.read_text().splitlines()) <= 250
