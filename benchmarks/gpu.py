"""Everything that only a GPU can show, prepared: one command, no network, random weights of real shapes.

    python benchmarks/gpu.py [--device cuda] [--part 1] [--row NAME ...] [--resume] [--seconds 560] [--out runs/gpu]
    python benchmarks/gpu.py --device cpu      # the same in a small form: only the device is new on a GPU
    python benchmarks/gpu.py --write           # runs/gpu/gpu.json into docs/gpu.json, and its table into docs/gpu.md

Each row of `gpu_rows/table.py` runs in a process of its own under a limit of time, so that a crash, a hang or a lack of
memory costs that row alone. Rows are printed as they end, and written to gpu.json in `--out`; gpu.log has all that
they wrote. `--resume` leaves out rows that have run to a verdict; `--seconds` begins no row whose limit would exceed
it. What a row needs and is not here is said. The exit code is 1 if a row that ran did not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from gpu_rows.child import Child, Result, preload  # noqa: E402
from gpu_rows.results import finished, line, parts, read, renewed, write  # noqa: E402
from gpu_rows.rows import Row, missing  # noqa: E402
from gpu_rows.table import PARTS, ROWS  # noqa: E402

KEPT, PAGE = ROOT / "docs" / "gpu.json", ROOT / "docs" / "gpu.md"
CPU_LIMIT = 400.0
"""Seconds of a row on a CPU, which others may be using."""


class Children:
    """Processes for rows. On a GPU's machine the next one imports while a row is running; a GPU is never forked over.

    Args:
        device: `cuda` or `cpu`.
        log: file that takes what they write.
    """

    def __init__(self, device: str, log: Path) -> None:
        self.device, self.log = device, log
        self.next: Child | None = None

    def run(self, row: Row, limit: float, following: Row | None) -> Result:
        """Runs a row; `following` is likely to be the next."""
        child = self._take(row)
        try:
            if following is not None and self.device == "cuda":
                self.next = self._start(following)
            return child.run(self.device, limit)
        finally:
            child.kill()

    def close(self) -> None:
        """Ends the one that waits."""
        if self.next is not None:
            self.next.kill()
            self.next = None

    def _take(self, row: Row) -> Child:
        """The one that waits, if it is for this row."""
        child, self.next = self.next, None
        if child is not None and child.row == row:
            return child
        if child is not None:
            child.kill()
        return self._start(row)

    def _start(self, row: Row) -> Child:
        if self.device == "cpu":
            preload(row)  # once, in the process that others are forked from
        return Child(row, "fork" if self.device == "cpu" else "spawn", self.log)


def run(
    rows: Sequence[Row], device: str, out: Path, *, resume: bool = False, seconds: float = math.inf, limit: float = 0
) -> bool:
    """Runs rows in their order; whether all of them that have a verdict passed.

    Args:
        rows: of the table.
        device: `cuda` or `cpu`.
        out: folder of gpu.json, whose other rows stay, and gpu.log.
        resume: leave out those that have run.
        seconds: for all of it.
        limit: of every row; 0: its own on a GPU, `CPU_LIMIT` on a CPU.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, began = out / "gpu.json", time.monotonic()
    results = read(file)
    mine = results.setdefault(device, {})
    todo = [(row, missing(row, device)) for row in rows if not (resume and finished(mine.get(row.name)))]
    able = [row for row, wanting in todo if not wanting]
    with contextlib.closing(Children(device, out / "gpu.log")) as children:
        for row, wanting in todo:
            most = limit or (row.limit if device == "cuda" else CPU_LIMIT)
            if wanting:
                mine[row.name] = {"verdict": "needs", "date": date.today().isoformat(), "figures": {}, "wrong": wanting}
            elif time.monotonic() - began + most > seconds:
                print(f"-              {row.part:3}{row.name:14} no time left; go on with --resume", flush=True)
                continue
            else:
                mine[row.name] = children.run(row, most, next(iter(able[able.index(row) + 1 :]), None))
            write(file, results)
            print(line(row, mine[row.name]), flush=True)
    return all(mine[row.name]["verdict"] != "fail" for row in rows if row.name in mine)


def keep(out: Path) -> None:
    """Takes what was found over into the pages."""
    results = read(KEPT)
    for device, found in read(out / "gpu.json").items():
        results[device] = results.get(device, {}) | found
    write(KEPT, results)
    PAGE.write_text(renewed(PAGE.read_text("utf-8"), ROWS, results), "utf-8")


def chosen(names: Iterable[str], part: str) -> list[Row]:
    """The rows of these names, or those of a part (`1` is 1a, 1b and 1c; empty: all)."""
    names = list(names)
    return [row for row in ROWS if (row.name in names if names else row.part.startswith(part))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", choices=["1", "2", *PARTS, ""], default="", help=parts(ROWS))
    parser.add_argument("--row", nargs="+", choices=[row.name for row in ROWS], default=[], metavar="NAME")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--write", action="store_true", help="only write docs/gpu.json and docs/gpu.md")
    asked = parser.parse_args()
    if asked.write:
        keep(asked.out)
        return 0
    rows = chosen(asked.row, asked.part)
    return 0 if run(rows, asked.device, asked.out, resume=asked.resume, seconds=asked.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
