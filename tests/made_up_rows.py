"""Rows for `benchmarks/gpu.py` that touch no device; as a program it runs them: OUT DEVICE, and JSON of more."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu_rows import child, rows
from gpu_rows.rows import Found, Row, Setting

child.PRELOAD = ()  # no row here needs torch


def passes(setting: Setting, found: Found) -> None:
    with Path(os.environ["MADE_UP_RAN"]).open("a") as file:
        file.write("passes\n")
    found.add("speed", 12.5, least=1)
    found.add("name", "a thing")


def out_of_bounds(setting: Setting, found: Found) -> None:
    found.add("gap", 0.5, most=0.1)
    found.add("gap of NaN", float("nan"), most=1)
    found.holds("it fits", False)


def raises(setting: Setting, found: Found) -> None:
    found.add("before", 1.0)
    raise ValueError("a bad value")


def crashes(setting: Setting, found: Found) -> None:
    found.add("before", 2.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(setting: Setting, found: Found) -> None:
    found.add("before", 3.0)
    found.add("scratch", str(setting.folder))
    threading.Event().wait()


def row(name: str) -> Row:
    return Row(name, "1a", name, f"made_up_rows:{name}", 2)


ROWS = [
    row("passes"),
    row("out_of_bounds"),
    row("raises"),
    Row("wants", "1b", "a package", "made_up_rows:passes", 2, ("no such package",)),
    row("crashes"),
    row("hangs"),
    Row("again", "1b", "comes after all of them", "made_up_rows:passes", 2),
]

if __name__ == "__main__":
    out, device, more = sys.argv[1:]
    rows.NEEDS["no such package"] = lambda device: False
    if device == "cuda":
        rows.NEEDS["CUDA"] = lambda device: True
    asked = json.loads(more)
    names = asked.pop("rows", [each.name for each in ROWS])
    chosen = [each for each in ROWS if each.name in names]
    sys.exit(not gpu.run(chosen, device, Path(out), **asked))
