"""All of `make gpu` in its small form, on a CPU: on a GPU only the device is new."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_rows.results import read  # noqa: E402
from gpu_rows.rows import Row, missing  # noqa: E402
from gpu_rows.table import ROWS  # noqa: E402

pytestmark = pytest.mark.heavy


SOAK = (
    *("vLLM sync", "vLLM updates", "vLLM rollout", "two ranks", "server", "demo", "learner 4B"),
    *("checkpointing", "offload", "adamw8bit", "TRL"),
)
"""Rows whose work other tests of CI do too: engines and their updates, a server, two processes, a whole run."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row for row in ROWS if row.name not in SOAK], id="most"),
        pytest.param([row for row in ROWS if row.name in SOAK], id="the longest", marks=pytest.mark.soak),
    ],
)
def test_every_row_passes_or_says_what_it_needs(rows: list[Row], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--out", str(tmp_path)]
    command += ["--row", *(row.name for row in rows)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    said = ran.stdout
    assert ran.returncode == 0, said + ran.stderr
    found = read(tmp_path / "gpu.json")["cpu"]
    for row in rows:
        wanting = missing(row, "cpu")
        assert found[row.name]["verdict"] == ("needs" if wanting else "pass")
        (line,) = (line for line in said.splitlines() if f" {row.part} " in line and f" {row.name} " in line)
        assert line.endswith(f"needs {', '.join(wanting)}") if wanting else line.startswith("pass")
        assert wanting or found[row.name]["figures"]
    assert {"CUDA"} == {name for row in ROWS for name in missing(row, "cpu")}
