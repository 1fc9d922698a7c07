"""The table of what only a GPU can show: its limits, what a bad row costs, going on, and the page made of it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_rows import results  # noqa: E402
from gpu_rows.rows import NEEDS, Found, Row  # noqa: E402
from gpu_rows.table import ALL_SECONDS, PART_SECONDS, PARTS, ROWS  # noqa: E402

PROGRAM = Path(__file__).parent / "made_up_rows.py"
ENDED = {
    "passes": ("pass", ""),
    "out_of_bounds": ("fail", "gap: 0.5, want at most 0.1"),
    "raises": ("fail", "ValueError: a bad value"),
    "wants": ("needs", "no such package"),
    "crashes": ("fail", "the process ended (signal SIGSEGV)"),
    "hangs": ("fail", "no end after 2 s"),
    "again": ("pass", ""),
}
"""Of the rows of made_up_rows.py: verdict, and the first thing that is wrong."""


def run(out: Path, device: str = "cpu", **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), str(out), device, json.dumps(more)]
    environment = os.environ | {"MADE_UP_RAN": str(out.with_suffix(".ran"))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def found(out: Path, device: str = "cpu") -> dict[str, Any]:
    return dict(json.loads((out / "gpu.json").read_text("utf-8"))[device])


def times_passed(out: Path) -> int:
    return out.with_suffix(".ran").read_text().count("passes")


# The table


def test_the_limits_fit_three_minutes_a_part_and_twelve_minutes_together() -> None:
    sums = Counter[str]()
    for row in ROWS:
        sums[row.part] += row.limit
    assert set(sums) == set(PARTS)
    assert max(sums.values()) <= PART_SECONDS == 180
    assert sum(sums.values()) <= ALL_SECONDS == 720


def test_every_row_has_a_name_of_its_own_a_function_and_known_needs() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 20
    assert [row.part for row in ROWS] == sorted(row.part for row in ROWS)
    for row in ROWS:
        module, _, function = row.run.partition(":")
        source = (ROOT / "benchmarks" / f"{module.replace('.', '/')}.py").read_text("utf-8")
        assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert set(row.needs) <= set(NEEDS)


def test_a_part_or_a_row_can_be_run_apart() -> None:
    assert {row.part for row in gpu.chosen([], "1")} == {"1a", "1b", "1c"}
    assert {row.part for row in gpu.chosen([], "3")} == {"3"}
    assert [row.name for row in gpu.chosen(["head"], "")] == ["head"]
    assert gpu.chosen([], "") == list(ROWS)


@pytest.mark.parametrize(
    ("value", "bounds", "wrong"),
    [
        (1.0, {}, ""),
        (1.0, {"least": 1, "most": 1}, ""),
        (2.0, {"most": 1}, "x: 2, want at most 1"),
        (0.5, {"least": 1, "most": 3}, "x: 0.5, want at least 1 and at most 3"),
        (float("nan"), {"most": 1}, "x: nan, want at most 1"),
        (float("nan"), {}, "x: nan, want a number"),
        (torch.tensor(3.0), {"least": 4}, "x: 3, want at least 4"),
    ],
)
def test_a_figure_is_judged_by_its_bounds(value: Any, bounds: dict[str, float], wrong: str) -> None:
    said: list[Any] = []
    Found(lambda *figure: said.append(figure)).add("x", value, **bounds)
    assert said[0][2] == wrong


# Running


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_that_fails_crashes_or_hangs_costs_that_row_only(device: str, tmp_path: Path) -> None:
    """On `cuda` (no row here touches it) the next process imports while a row is running."""
    ran = run(tmp_path / "out", device, limit=2)
    assert ran.returncode == 1, ran.stderr
    rows = found(tmp_path / "out", device)
    assert {name: (r["verdict"], *r["wrong"][:1]) for name, r in rows.items()} == {
        name: (verdict, *[wrong] * bool(wrong)) for name, (verdict, wrong) in ENDED.items()
    }
    assert len(rows["out_of_bounds"]["wrong"]) == 3
    assert rows["passes"]["figures"] == {"speed": 12.5, "name": "a thing"}
    assert [rows[name]["figures"]["before"] for name in ("raises", "crashes", "hangs")] == [1.0, 2.0, 3.0]
    assert "in raises" in rows["raises"]["log"]
    assert "in crashes" in rows["crashes"]["log"]  # where it was
    assert "in hangs" in rows["hangs"]["log"]  # and before its time was over
    assert not Path(rows["hangs"]["figures"]["scratch"]).exists()
    for name, (verdict, wrong) in ENDED.items():
        (line,) = (line for line in ran.stdout.splitlines() if f" {name} " in f"{line} " and line[0] != " ")
        assert line.startswith("-" if verdict == "needs" else verdict)
        assert wrong in ran.stdout


def test_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, rows=["passes", "raises", "wants"]).returncode == 1
    before = found(out)
    ran = run(out, resume=True, rows=["passes", "raises", "wants", "again"])
    after = found(out)
    assert times_passed(out) == 2
    assert {name: after[name] for name in ("passes", "raises")} == {name: before[name] for name in ("passes", "raises")}
    assert after["again"]["verdict"] == "pass"
    assert "passes" not in ran.stdout
    assert "needs no such package" in ran.stdout
    assert run(out, rows=["passes"]).returncode == 0  # not resumed, it is run once more
    assert times_passed(out) == 3
    assert found(out).keys() == after.keys()


def test_no_row_begins_whose_limit_would_exceed_the_time(tmp_path: Path) -> None:
    ran = run(tmp_path / "out", rows=["passes", "wants"], limit=20, seconds=10)
    assert "passes         no time left; go on with --resume" in ran.stdout
    assert found(tmp_path / "out").keys() == {"wants"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_row_says_that_it_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(ROWS, "cuda", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROWS)
    assert all(row.name in line and "needs CUDA" in line for row, line in zip(ROWS, lines, strict=True))


# The page


def test_the_page_is_made_of_the_file() -> None:
    text = gpu.PAGE.read_text("utf-8")
    assert results.renewed(text, ROWS, results.read(gpu.KEPT)) == text, "run: python benchmarks/gpu.py --write"


def test_what_never_ran_on_a_gpu_is_marked_so() -> None:
    rows = [Row(name, "1a", "w", "m:f", 1) for name in ("a", "b", "c")]
    made = {"verdict": "fail", "date": "2026-12-01", "seconds": 3.2, "figures": {"gap": 0.5}, "wrong": ["gap: 0.5 | 1"]}
    wanting = {"verdict": "needs", "date": "2026-12-01", "figures": {}, "wrong": ["CUDA"]}
    page = results.table(rows, {"cuda": {"a": made, "b": wanting}, "cpu": {"c": {**made, "verdict": "pass"}}})
    a, b, c = page.splitlines()[2:]
    empty = f"{results.BEGIN}{results.END}"
    assert "**Nothing has run on a GPU so far.**" in results.renewed(empty, rows, {"cuda": {"b": wanting}})
    assert "**1 of 3 rows have run on a GPU so far.**" in results.renewed(empty, rows, {"cuda": {"a": made}})
    assert a.endswith("| fail, 2026-12-01, 3 s: gap 0.5; **gap: 0.5 / 1** | never run |")
    assert b.endswith("| **never run** | never run |")
    assert c.endswith("| **never run** | pass, 2026-12-01 |")


def test_other_pages_refer_to_it() -> None:
    for name in ("docs/memory.md", "docs/sync.md", "docs/parallel.md", "docs/benchmarks.md", "README.md"):
        assert "gpu.md" in (ROOT / name).read_text("utf-8"), name
