"""1,318 real cells, written by a model, give the output that was recorded with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_gym.envs.tools.sandbox import PythonSession


@pytest.mark.parametrize(
    ("backend", "every"),
    [
        ("worker", 3),
        ("jupyter", 12),
        *(pytest.param(each, 1, marks=pytest.mark.soak) for each in ("worker", "jupyter")),
    ],
)
def test_every_recorded_cell_gives_its_recorded_output(backend: str, every: int, shared: Callable[[str], Path]) -> None:
    """CI has every third cell; a Jupyter kernel takes three times as long to begin as a worker: every twelfth."""
    rows = [json.loads(line) for line in shared("data/pytool/llm_cells.jsonl").open()]

    def differs(row: dict[str, Any]) -> str:
        with PythonSession(backend) as session:
            result = session.run(row["code"], timeout=60)
        shown = result.output.strip() if row["status"] == "ok" else result.output.strip().splitlines()[-1]
        same = shown == row["recorded_output"].strip() and result.status == row["status"]
        return "" if same else f"{row['trace']}: {row['recorded_output']!r}, not {result}"

    with ThreadPoolExecutor(8) as threads:
        wrong = list(filter(None, threads.map(differs, rows[::every])))
    assert len(rows) == 1318
    assert not wrong, wrong[:5]
