"""`llmgym train --nproc`: what one process learns, and nobody left behind or waiting when one of them is lost."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks
import torch
import yaml
from click.testing import CliRunner
from leftovers import living
from safetensors.torch import load_file
from sandbox_tiers import within

from llm_gym.cli.group import llmgym
from llm_gym.harness.runs.run_folder import RunFolder

pytestmark = pytest.mark.heavy

LLMGYM = [sys.executable, "-m", "llm_gym.cli"]
SMALL = ["--set", "prompts_per_step=4", "--set", "group_size=4", "--set", "eval.episodes=8"]
STRATEGIES = [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"]
"""CI keeps the one whose weights are split; the other's steps and checkpoints are compared in test_loops_nproc.py."""
DEADLINE = 240.0
"""Seconds that only a failure takes."""


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Whole rows: the last may be half written."""
    return RunFolder(run).metrics()


def until(true: Callable[[], Any], what: str) -> Any:
    limit = time.monotonic() + DEADLINE
    while time.monotonic() < limit:
        if value := true():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {DEADLINE:.0f} s")


def train(run: Path, *more: str, steps: int = 1000) -> list[str]:
    return [*LLMGYM, "train", *SMALL, "--steps", str(steps), "--out", str(run), *more]


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], dict[int, psutil.Process]]]]:
    """`begun(*arguments)`: a run of two processes that has made a step: the launcher, and the process of each rank."""
    started: list[psutil.Process] = []

    def begin(*arguments: str) -> tuple[subprocess.Popen[str], dict[int, psutil.Process]]:
        command = train(tmp_path / "run", "--nproc", "2", *arguments)
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(psutil.Process(launcher.pid))
        until(lambda: len(rows_of(tmp_path / "run")) > 1 or launcher.poll() is not None, "a first step")
        assert launcher.poll() is None, launcher.communicate()
        found = psutil.Process(launcher.pid).children(recursive=True)
        started.extend(found)
        return launcher, ranks_among(found)

    yield begin
    for process in living(started):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def ranks_among(processes: list[psutil.Process]) -> dict[int, psutil.Process]:
    """The process of each rank; what it starts itself inherits its variables, and may end at any time."""
    found: dict[int, psutil.Process] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank, parent = process.environ().get("RANK"), process.parent()
            if rank is not None and parent is not None and "RANK" not in parent.environ():
                found[int(rank)] = process
    return found


def gone(processes: dict[int, psutil.Process]) -> bool:
    return within(DEADLINE, lambda: not living(processes.values()))


def alone_to_its_end(run: Path, *more: str, steps: int) -> None:
    """One process that needs no other: this one, which has imported everything."""
    done = CliRunner().invoke(llmgym, train(run, *more, steps=steps)[len(LLMGYM) :])
    assert done.exit_code == 0, done.output


def run_to_its_end(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
    return weights


# Learning


@pytest.mark.soak
def test_a_logger_that_cannot_start_ends_all_processes_with_one_sentence(tmp_path: Path) -> None:
    """It is opened on rank 0 alone; the other is told, and neither waits nor speaks."""
    words = train(tmp_path / "run", "--nproc", "2", "--set", "log.to=[json:loads]")
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")] == [
        "Error: log.to: 'json:loads' cannot start (TypeError: loads() takes 1 positional argument but 3 were given)."
    ]
    assert "gone" not in done.stderr


CONSTANT = ["--set", "optimizer.schedule=constant", "--set", "checkpoint.keep=9", "--set", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process: four steps of a run that was never interrupted, and two steps of one."""
    folder: Path = tmp_path_factory.mktemp("alone")
    alone_to_its_end(folder / "whole", *CONSTANT, steps=4)
    alone_to_its_end(folder / "half", *CONSTANT, steps=2)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_by_more_or_fewer_processes_it_is_the_run_of_one(strategy: str, tmp_path: Path, alone: Path) -> None:
    """2 -> 1 and 1 -> 2, against one process that was never interrupted: the same episodes, steps and weights."""
    several = ["--nproc", "2", "--set", f"parallel.strategy={strategy}"]
    run_to_its_end(train(tmp_path / "fewer", *CONSTANT, *several, steps=2))
    alone_to_its_end(tmp_path / "fewer", "--resume", steps=4)
    shutil.copytree(alone / "half", tmp_path / "more")
    run_to_its_end(train(tmp_path / "more", *several, "--resume", steps=4))
    for name in ("fewer", "more"):
        for ours, theirs in zip(rows_of(tmp_path / name)[1:], rows_of(alone / "whole")[1:], strict=True):
            for metric in ("reward/mean", "tokens/generated", "tokens/trained"):
                assert ours.get(metric) == theirs.get(metric)
            assert ours.get("policy/grad_norm") == pytest.approx(theirs.get("policy/grad_norm"), rel=1e-3)
        want = weights_of(alone / "whole", 4)
        for tensor, value in weights_of(tmp_path / name, 4).items():
            torch.testing.assert_close(value, want[tensor], rtol=0, atol=1e-5)
        assert (tmp_path / name / "report.html").exists()
        starts = yaml.safe_load((tmp_path / name / "provenance.yaml").read_text())
        assert len(starts) == 2, "rank 0 alone says what the run was made with"


@pytest.mark.soak  # CI compares their steps with those of one process
def test_two_processes_learn(tmp_path: Path) -> None:
    """A third of the default run."""
    command = [*LLMGYM, "train", "--nproc", "2", "--steps", "40", "--out", str(tmp_path / "run")]
    said = run_to_its_end([*command, "--set", "optimizer.schedule=constant", "--set", "eval.episodes=256"])
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["eval/greedy_reward"] > rows[0]["eval/greedy_reward"] + 0.05
    assert said.count("Report:") == 1


# Losing a rank


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.soak)])  # in CI: test_nproc_engines.py
def test_a_killed_rank_ends_the_run_and_is_named(lost: int, begun) -> None:
    launcher, processes = begun()
    processes[lost].send_signal(signal.SIGKILL)
    _, said = launcher.communicate(timeout=DEADLINE)
    assert f"Error: rank {lost} was killed by SIGKILL; the other processes were stopped." in said
    assert "Stopped after step" not in said, "one speaks for all"
    assert launcher.returncode == 2
    assert "Traceback" not in said
    assert gone(processes)


# In CI test_nproc_engines.py has Ctrl-C.
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_all_processes_with_one_sentence(how: signal.Signals, begun) -> None:
    launcher, processes = begun()
    launcher.send_signal(how)
    _, said = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 130
    assert said.count("Stopped after step") == 1
    assert said.count("llmgym train --resume --out") == 1
    assert "Traceback" not in said
    assert gone(processes)


def test_processes_do_not_outlive_what_started_them(begun) -> None:
    launcher, processes = begun()
    launcher.kill()
    assert gone(processes)


@contextlib.contextmanager
def pairs(runs: dict[str, list[str]]) -> Iterator[dict[str, list[subprocess.Popen[str]]]]:
    """Both processes of each run, by its folder, when it has made a step; runs side by side, for they wait long."""
    started = {
        folder: ranks.start(train(Path(folder), *words), 2, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for folder, words in runs.items()
    }
    try:
        for folder in runs:
            until(lambda f=folder: len(rows_of(Path(f))) > 1, "a first step")
        yield started
    finally:
        for process in itertools.chain(*started.values()):
            process.kill()


@pytest.mark.soak
def test_without_a_launcher_the_others_find_out_themselves(tmp_path: Path) -> None:
    """Rank 0 holds the store here; each process must see that the other is dead, and say so."""
    with pairs({str(tmp_path / f"without-{lost}"): [] for lost in (0, 1)}) as started:
        for lost, both in enumerate(started.values()):
            both[lost].kill()
        for lost, both in enumerate(started.values()):
            said, _ = both[1 - lost].communicate(timeout=DEADLINE)
            assert both[1 - lost].returncode not in (0, None)
            assert f"rank {lost}" in said.splitlines()[-1], said
            assert "frame #" not in said, "torch's own account of a lost connection"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_stands_still_is_named_when_time_is_up(strategy: str, tmp_path: Path) -> None:
    words = ["--set", "parallel.timeout=20", "--set", f"parallel.strategy={strategy}"]
    with pairs({str(tmp_path / "run"): words}) as started:
        ((asks, stands),) = started.values()
        stands.send_signal(signal.SIGSTOP)
        said, _ = asks.communicate(timeout=DEADLINE)
        assert asks.returncode == 2
        assert said.splitlines()[-1].startswith("Error: rank 1 "), said
