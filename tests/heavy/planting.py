"""A process that has pytest and the heavy libraries loaded, and forks once for each planted bug: `python planting.py`.

Each line of its input is a JSON list `[folder, test, ...]`: a copy of the repository, and tests to run there.
Each line of its output is `[folder, exit code of pytest]`; pytest's own words are in `folder/output`.
"""

import gc
import json
import os
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path

AT_ONCE = 2
LIMIT = 600
"""Seconds that the tests of one bug may take; without a bug, all of them."""
WRONG_COPY = 70
"""Exit code if the package that was imported is not the planted one."""


def main() -> None:
    import click.testing  # noqa: F401
    import gymnasium  # noqa: F401
    import hypothesis.extra.numpy  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401

    for plugin in entry_points(group="pytest11"):
        plugin.load()
    torch.set_num_threads(1)
    gc.freeze()  # pytest collects garbage several times; what was loaded here is none
    running: dict[int, str] = {}
    for line in sys.stdin:
        if len(running) == AT_ONCE:
            report(running)
        folder, *tests = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(Path(folder), tests))
        running[child] = folder
    while running:
        report(running)


def report(running: dict[int, str]) -> None:
    """Waits for one child."""
    child, status = os.wait()
    print(json.dumps([running.pop(child), os.waitstatus_to_exitcode(status)]), flush=True)


def run(folder: Path, tests: list[str]) -> int:
    """Runs the tests in this (forked) process."""
    signal.alarm(LIMIT)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import pytest

    import llm_gym

    if Path(llm_gym.__file__).parent != folder / "llm_gym":
        return WRONG_COPY
    code = pytest.main(["-p", "no:cacheprovider", "-rf", "--hypothesis-seed=0", *(f"tests/{t}" for t in tests)])
    sys.stdout.flush()
    return int(code)


if __name__ == "__main__":
    main()
