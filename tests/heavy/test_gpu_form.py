"""All of `make gpu` in its small form, on a CPU: on a GPU only the device is new."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_rows.results import read  # noqa: E402
from gpu_rows.rows import missing  # noqa: E402
from gpu_rows.table import ROWS  # noqa: E402

pytestmark = pytest.mark.heavy


@pytest.mark.timeout(1800)
def test_every_row_passes_or_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    said = ran.stdout
    assert ran.returncode == 0, said + ran.stderr
    rows = read(tmp_path / "gpu.json")["cpu"]
    for row in ROWS:
        wanting = missing(row, "cpu")
        assert rows[row.name]["verdict"] == ("needs" if wanting else "pass")
        (line,) = (line for line in said.splitlines() if f" {row.part} " in line and f" {row.name} " in line)
        assert line.endswith(f"needs {', '.join(wanting)}") if wanting else line.startswith("pass")
        assert wanting or rows[row.name]["figures"]
    assert {"CUDA"} == {name for row in ROWS for name in missing(row, "cpu")}
