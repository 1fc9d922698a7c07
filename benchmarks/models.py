"""Small random models of every architecture: how far learner, engine, adapters and vLLM are from plain forwards.

    OMP_NUM_THREADS=1 python benchmarks/models.py [--variants 'Gemma 2;Phi'] [--columns learner,engine] [--write]

Each measurement runs in a process of its own, so that none can end the others; `--workers` of them run at once. What
is measured is kept in `--results` and not measured again (`--fresh`: again). `--write` puts the table into
docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import peft  # noqa: E402, F401  # once, not in every process
import torch  # noqa: E402
from agreement import COLUMNS, TOLERANCE, Measured, guarded  # noqa: E402
from architectures import BY_NAME, VARIANTS  # noqa: E402
from transformers.utils import logging as hf_logging  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SECONDS = 300
"""Most that one measurement may take."""
Results = dict[str, dict[str, dict[str, Any]]]
"""Variant -> column -> a `Measured` as a mapping."""


class Running:
    """One cell, being measured in a process of its own."""

    def __init__(self, name: str, column: str) -> None:
        self.name, self.column, self.end = name, column, time.monotonic() + SECONDS
        # A fork has imported everything; vLLM starts threads and wants a process that has done nothing yet.
        context = multiprocessing.get_context("spawn" if column == "vllm" else "fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(name, column, theirs))
        self.process.start()
        theirs.close()

    def result(self) -> dict[str, Any] | None:
        """What was found; None: not yet."""
        if not self.pipe.poll():
            if time.monotonic() < self.end:
                return None
            self.process.kill()
            found = asdict(Measured(failed=f"no result after {SECONDS} s"))
        else:
            try:
                found = dict(self.pipe.recv())
            except EOFError:
                found = asdict(Measured(failed="the process ended"))
        self.process.join()
        return found


def measure(cells: Sequence[tuple[str, str]], workers: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Measures (variant, column) pairs, some at once; gives each as it is found."""
    waiting, running = list(reversed(cells)), list[Running]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Running(*waiting.pop()))
        wait([each.pipe for each in running], timeout=1)
        for each in list(running):
            if (found := each.result()) is not None:
                running.remove(each)
                yield each.name, each.column, found


def _child(name: str, column: str, out: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    out.send(asdict(guarded(lambda: COLUMNS[column](BY_NAME[name]))))


def cell(found: Mapping[str, Any] | None) -> str:
    """As it stands in the table."""
    if found is None:
        return ""
    if found["failed"]:
        return f"**error**: {_short(found['failed'])}"
    if found["refused"]:
        return f"refused: {_short(found['refused'])}"
    number = f"{found['error']:.0e}".replace("e-0", "e-")
    number = number if found["error"] <= TOLERANCE else f"**{found['error']:.2g}**"
    return f"{number} {_short(found['restricted'])}".strip()


def _short(text: str) -> str:
    """At most a line, safe in a table."""
    text = re.sub(r"'/\S*'", "it", text).replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= 120 else text[:117] + "..."


def table(results: Results, columns: list[str]) -> str:
    """All that was measured, in Markdown."""
    lines = [f"| variant | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for variant in VARIANTS:
        found = results.get(variant.name, {})
        lines.append(f"| {variant.name} | {' | '.join(cell(found.get(column)) for column in columns)} |")
    return "\n".join(lines)


def summary(results: Results, columns: list[str]) -> str:
    """How many of what, for each column."""
    lines = [
        "| column | right | of these restricted | refused | wrong or failed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for column in columns:
        found = [Measured(**cells[column]) for cells in results.values() if column in cells]
        right = [f for f in found if f.error is not None and not f.wrong]
        counts = len(right), sum(bool(f.restricted) for f in right), sum(bool(f.refused) for f in found)
        lines.append(f"| {column} | {' | '.join(map(str, counts))} | {sum(f.wrong for f in found)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing; prints it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="", help="parts of names, divided by ';'; all by default")
    parser.add_argument(
        "--columns", default=",".join(c for c in COLUMNS if c != "vllm"), help=f"of {', '.join(COLUMNS)}"
    )
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "llm_gym_models.json")
    parser.add_argument("--workers", type=int, default=2, help="measurements at once")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    asked = parser.parse_args()
    columns = asked.columns.split(",")
    if unknown := set(columns) - set(COLUMNS):
        parser.error(f"--columns: got {sorted(unknown)}, want some of {list(COLUMNS)}.")
    names = [v.name for v in VARIANTS if not asked.variants or any(p in v.name for p in asked.variants.split(";"))]
    results: Results = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    missing = [(n, c) for c in columns for n in names if asked.fresh or c not in results.get(n, {})]
    for name, column, found in measure(missing, asked.workers):
        results.setdefault(name, {})[column] = found
        print(f"{column:8} {name:40} {cell(found)}", flush=True)
        asked.results.write_text(json.dumps(results, indent=1))
    results = {v.name: results[v.name] for v in VARIANTS if v.name in results}
    print(summary(results, list(COLUMNS)))
    if asked.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        text = f"{summary(results, list(COLUMNS))}\n\n{table(results, list(COLUMNS))}"
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
