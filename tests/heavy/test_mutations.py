"""Every known bug of GRPO trainers, and of the loops around them, put back: its test fails.

And without it, every one of these tests passes. CI plants the bugs of what changed and a sample of the others
(`planted.chosen`; LLM_GYM_MUTANTS names another base); `make mutations` plants all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations_all import EVERY
from planted import ROOT, Mutant, chosen, with_bug

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]  # the first test waits for all of them

# The worker's names of its tests must be those of every other worker: nothing here but the commit decides.
PLANTED, HOW = chosen(EVERY, os.environ.get("LLM_GYM_MUTANTS", ""))
CONTROL = Mutant("none", "", "", "", tuple(sorted({test for mutant in PLANTED for test in mutant.tests})))
"""No bug at all: every test passes."""


def label(mutant: Mutant) -> str:
    return mutant.bug


def plant(mutant: Mutant, folder: Path) -> None:
    """A copy of the package and its tests, with the bug."""
    # Compiled files spare each copy a second; those that another process is about to rename may vanish meanwhile.
    ignore = shutil.ignore_patterns(".hypothesis", ".pytest_cache", "*.pyc.*")
    for name in ("llm_gym", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutant.file:
        source = folder / "llm_gym" / mutant.file
        source.write_text(with_bug(source.read_text(encoding="utf-8"), mutant), encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each selected bug: pytest's exit code and words, by label; bugs run in processes of their own, two at once."""
    chosen = [item.callspec.params["mutant"] for item in request.session.items if item.fspath == request.path]
    base, found, waiting = tmp_path_factory.mktemp("planted"), {}, threading.Semaphore(3)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    command = [sys.executable, str(Path(__file__).with_name("planting.py"))]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=base) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def feed() -> None:
            with process.stdin as jobs:
                for number, mutant in enumerate(chosen):
                    waiting.acquire()  # at most three copies on disk
                    plant(mutant, base / str(number))
                    jobs.write(json.dumps([str(base / str(number)), *mutant.tests]) + "\n")
                    jobs.flush()

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        try:
            for line in process.stdout:
                folder, code = json.loads(line)
                text = Path(folder, "output").read_text(encoding="utf-8", errors="replace")
                found[label(chosen[int(Path(folder).name)])] = f"exit code {code}\n{text}"
                shutil.rmtree(folder)
                waiting.release()
        finally:
            process.kill()
    return found


@pytest.mark.parametrize("mutant", [CONTROL, *PLANTED], ids=label)
def test_it_is_caught(mutant: Mutant, outcomes: dict[str, str], record_property: Callable[[str, object], None]) -> None:
    record_property("planted bugs", HOW)
    outcome = outcomes[label(mutant)]
    if mutant is CONTROL:
        assert outcome.startswith("exit code 0\n"), outcome[-3000:]
        return
    assert outcome.startswith("exit code 1\n"), outcome[-3000:]
    for test in mutant.tests:
        assert f"FAILED tests/{test}" in outcome, f"not caught by {test}:\n{outcome[-3000:]}"
