"""What was found: a JSON file that is written after each row, and the table of docs/gpu.md that is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_rows.rows import Row, show
from gpu_rows.table import PARTS
from llm_gym.harness.runs.run_folder import write_atomically

DEVICES = ("cuda", "cpu")
Results = dict[str, dict[str, dict[str, Any]]]
"""Device -> row -> a `child.Result`."""
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def read(file: Path) -> Results:
    """Those of a file; none if there is no file."""
    found: Results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def write(file: Path, results: Results) -> None:
    """Replaces the file whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def finished(result: Mapping[str, Any] | None) -> bool:
    """Whether a row was run to a verdict: `--resume` leaves it as it is."""
    return result is not None and result["verdict"] in ("pass", "fail")


def line(row: Row, result: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    head = f"{result['verdict']:5}{result.get('seconds', 0):6.1f} s  {row.part:3}{row.name:14}"
    if result["verdict"] == "needs":
        return f"{'-':5}{'':8}  {row.part:3}{row.name:14} needs {', '.join(result['wrong'])}"
    lines = [head, *(f"{'':26}{name}: {show(value)}" for name, value in result["figures"].items())]
    lines += [f"{'':18}WRONG   {wrong}" for wrong in result["wrong"]]
    lines += [f"{'':26}| {each}" for each in result.get("log", "").splitlines()]
    return "\n".join(lines)


def table(rows: Iterable[Row], results: Results) -> str:
    """All rows in Markdown: what ran on a GPU, with its figures, and whether the small form passes on a CPU."""
    lines = [
        "| part | row | what | limit, s | needs | on a GPU | small form on a CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gpu, cpu = (results.get(device, {}).get(row.name) for device in DEVICES)
        needs = ", ".join(row.needs)
        lines.append(
            f"| {row.part} | {row.name} | {row.what} | {row.limit:g} | {needs} | {_on_gpu(gpu)} | {_on_cpu(cpu)} |"
        )
    return "\n".join(lines)


def _on_gpu(result: Mapping[str, Any] | None) -> str:
    if not finished(result):
        return "**never run**"
    assert result is not None
    figures = "; ".join(f"{name} {show(value)}" for name, value in result["figures"].items())
    wrong = "".join(f"; **{wrong}**" for wrong in result["wrong"])
    return f"{result['verdict']}, {result['date']}, {result['seconds']:.0f} s: {figures}{wrong}".replace("|", "/")


def _on_cpu(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "never run"
    if result["verdict"] == "needs":
        return f"needs {', '.join(result['wrong'])}"
    return f"{result['verdict']}, {result['date']}"


def parts(rows: Iterable[Row]) -> str:
    """Each part and the sum of its limits."""
    rows = list(rows)
    sums = {part: sum(row.limit for row in rows if row.part == part) for part in PARTS}
    return ", ".join(f"{part} {total:g} s" for part, total in sums.items()) + f", together {sum(sums.values()):g} s"


def renewed(page: str, rows: Iterable[Row], results: Results) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = list(rows)
    ran = sum(finished(results.get("cuda", {}).get(row.name)) for row in rows)
    state = f"{ran} of {len(rows)} rows have run" if ran else "Nothing has run"
    made = [f"**{state} on a GPU so far.**", table(rows, results), f"Sums of limits: {parts(rows)}."]
    return f"{before}{BEGIN}\n" + "\n\n".join(made) + f"\n{END}{after}"
