"""Ranks that share one import: a process that has imported a program forks as many as each job asks for.

python forked.py <program> '[[2, ["argument"]], [3, ["argument"]]]'     # one job after another

Every rank runs the program with torchrun's variables. To import torch and transformers takes a rank longer than what
most tests ask of it; tests of how processes start and end start real ones.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path


def main(program: str, jobs: list[tuple[int, list[str]]]) -> int:
    from forks import reserved

    folder = Path(tempfile.mkdtemp())
    for size, arguments in jobs:
        with reserved() as port:  # each rank keeps it reserved as long as it lives
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": str(size)}
            said = {}
            for rank in range(size):
                if (child := os.fork()) == 0:
                    work(program, arguments, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder)
                said[child] = f"{folder}/{rank}"
            ends = [os.wait() for _ in said]
        failed = [f"{said[child]}: {Path(said[child]).read_text()[-3000:]}" for child, status in ends if status]
        if failed:
            print("\n".join(failed))
            return 1
    return 0


def work(program: str, arguments: list[str], place: dict[str, str], folder: Path) -> None:
    """In the fork: the program, to its end."""
    os.environ.update(place)
    sys.argv = [program, *arguments]
    output = os.open(folder / place["RANK"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        runpy.run_path(program, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path += [str(here), str(here.parent / "harness"), str(here.parent)]
    for name in (Path(sys.argv[1]).stem, "peft", "bitsandbytes"):
        importlib.import_module(name)
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
