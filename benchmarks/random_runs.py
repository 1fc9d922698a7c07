"""Random configurations of every loop: run, killed and resumed, replayed (tests/random_configurations.py).

    OMP_NUM_THREADS=1 python benchmarks/random_runs.py [--count 400] [--first 1000] [--seed N]

Ends with status 1 if anything was raised that is not the project's own error, or does not hold; `--seed` runs one
configuration, with its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from random_configurations import check, draw


def attempt(seed: int) -> str:
    """How one configuration went: `ran`, the sentence that refused it, or `FAILED ...`."""
    folder = Path(tempfile.mkdtemp(prefix="llmgym-random-"))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return check(draw(seed), folder)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILED {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--first", type=int, default=1000, help="seed of the first configuration")
    parser.add_argument("--seed", type=int, help="this one alone")
    args = parser.parse_args()
    if args.seed is not None:
        print(draw(args.seed))
        print(check(draw(args.seed), Path(tempfile.mkdtemp(prefix="llmgym-random-"))))
        return
    began, failed, told = time.monotonic(), 0, Counter[str]()
    for seed in range(args.first, args.first + args.count):
        outcome = attempt(seed)
        told["ran" if outcome == "ran" else "failed" if outcome.startswith("FAILED") else "refused"] += 1
        if outcome != "ran":
            print(f"{seed}: {' '.join(outcome.split())}", flush=True)
        if outcome.startswith("FAILED"):
            failed += 1
            print(f"    {draw(seed)}", flush=True)
    print(", ".join(f"{count} {name}" for name, count in told.items()), f"in {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
