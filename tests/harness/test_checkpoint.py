"""The run folder survives what a kill leaves behind."""

from __future__ import annotations

import json
import math
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from llm_gym.cli.group import llmgym
from llm_gym.core import Episode, StopReason
from llm_gym.errors import CheckpointError
from llm_gym.harness.runs.run_folder import RunFolder, put, step_of


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start("steps: 3\n")
    return folder


def fill(run: RunFolder, steps: int) -> None:
    for step in range(steps + 1):
        run.write_episodes(f"step_{step:06d}", [Episode("e", step, (), StopReason.ANSWERED)])
        run.log({"step": step, "reward/mean": step / 2})


def test_rewind_forgets_later_rows_and_episodes(run: RunFolder) -> None:
    fill(run, 5)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    (run.path / "episodes" / "step_000006.jsonl.partial").write_text("{")
    (run.path / "checkpoints" / ".partial-step_000006").mkdir()
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4, 5]
    run.rewind(2)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert sorted(p.name for p in (run.path / "episodes").iterdir()) == [f"step_{s:06d}.jsonl" for s in range(3)]
    assert not list((run.path / "checkpoints").iterdir())
    fill(run, 0)
    assert run.metrics_file.read_text().endswith("\n")


def test_a_checkpoint_appears_whole_or_not_at_all(run: RunFolder) -> None:
    run.save(1, lambda folder: (folder / "w").write_text("one") and None, keep=2)

    def dies(folder: Path) -> None:
        (folder / "w").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save(2, dies, keep=2)
    assert [step_of(c) for c in run.checkpoints()] == [1]
    run.save(2, lambda folder: (folder / "w").write_text("two") and None, keep=2)
    run.save(3, lambda folder: (folder / "w").write_text("three") and None, keep=2)
    assert [(step_of(c), (c / "w").read_text()) for c in run.checkpoints()] == [(2, "two"), (3, "three")]


def test_rows_are_json_even_when_numbers_are_not(run: RunFolder) -> None:
    run.log({"step": 0, "a": math.nan, "b": math.inf, "c": 0.1})
    assert json.loads(run.metrics_file.read_text()) == {"step": 0, "a": None, "b": None, "c": 0.1}


def test_a_folder_with_a_run_is_not_overwritten(run: RunFolder) -> None:
    run.start("steps: 3\n")  # nothing has happened here yet
    run.log({"step": 0})
    with pytest.raises(CheckpointError, match="--resume"):
        run.start("steps: 4\n")
    assert run.config_file.read_text() == "steps: 3\n"


WRITER = """
import sys
from llm_gym.harness.runs.run_folder import RunFolder, put
RunFolder(sys.argv[1]).hold()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_write_one_run(run: RunFolder) -> None:
    """The lock names its holder, and goes with it, however it ends."""
    run.release()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(run.path)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError) as caught:
            run.hold()
        assert f"is being written by process {other.pid} on {socket.gethostname()}" in str(caught.value)
        other.kill()
        other.wait()
    run.hold()
    run.hold()
    run.release()


def test_resuming_does_not_rewind_what_another_process_writes(run: RunFolder) -> None:
    fill(run, 3)
    run.release()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(run.path)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        words = ["train", "--resume", "--out", str(run.path), "--set", "prompts_per_step=1"]
        result = CliRunner().invoke(llmgym, words)
        assert result.exit_code == 2
        assert "is being written by process" in result.stderr
        assert len(run.metrics()) == 4
        other.kill()


def torch_save(folder: Path) -> None:
    torch.save({"numbers": torch.zeros(50_000)}, folder / "trainer.pt")


def safetensors_save(folder: Path) -> None:
    save_file({"numbers": torch.zeros(50_000)}, folder / "model.safetensors")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be larger: what a full disk is to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [torch_save, safetensors_save])
def test_a_checkpoint_that_does_not_fit_is_one_sentence(run: RunFolder, write: Callable[[Path], None]) -> None:
    """What was saved before stays whole, nothing half-written stays, and with room it goes on."""
    run.save(1, torch_save, keep=2)
    with room_for(10_000), pytest.raises(CheckpointError) as caught:
        run.save(2, write, keep=2)
    said = str(caught.value)
    assert "cannot be written" in said
    assert "the checkpoint of step 1 is whole" in said
    assert said.endswith(f"go on with --resume --out {run.path}")
    assert [entry.name for entry in (run.path / "checkpoints").iterdir()] == ["step_000001"]
    run.save(2, write, keep=2)
    assert [step_of(saved) for saved in run.checkpoints()] == [1, 2]


WRITES: dict[str, Callable[[RunFolder], object]] = {
    "a row": lambda run: run.log({"step": 3}),
    "episodes": lambda run: fill(run, 1),
    "a checkpoint": lambda run: run.save(3, torch_save, keep=2),
    "settings": lambda run: run.write_config("steps: 4\n"),
    "a start": lambda run: run.add_provenance({"step": 3}),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_a_run_folder_that_is_gone_is_one_sentence(run: RunFolder, what: str, how: str) -> None:
    """It is not made anew: half a run would lie there."""
    run.path.rename(run.path.with_name("elsewhere")) if how == "renamed" else shutil.rmtree(run.path)
    with pytest.raises(CheckpointError, match=r"is gone \(deleted or renamed\?\)"):
        WRITES[what](run)
    assert not run.path.exists()


def test_a_full_disk_loses_no_row_that_was_written(run: RunFolder) -> None:
    fill(run, 2)
    with room_for(run.metrics_file.stat().st_size + 5), pytest.raises(CheckpointError, match="there is no checkpoint"):
        run.log({"step": 3, "reward/mean": 0.5})
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    with pytest.raises(CheckpointError, match=r"^out: '.*afile' cannot be a run folder \(it is a file\)"):
        RunFolder(tmp_path / "afile").start("steps: 3\n")


def test_a_copy_in_which_links_were_followed_goes_on(run: RunFolder) -> None:
    """`best` is a folder then, which no link can replace."""
    for step in (1, 2, 3):
        run.save(step, lambda folder, step=step: (folder / "weights").write_text(f"{step}"), keep=1, best=step == 2)
    copy = RunFolder(shutil.copytree(run.path, run.path.with_name("copy")))
    best = copy.path / "checkpoints" / "best"
    assert not best.is_symlink()
    copy.hold()
    copy.rewind(3)
    assert best.is_symlink()
    assert best.resolve().name == "step_000002"
    copy.save(4, lambda folder: None, keep=1)
    assert [step_of(saved) for saved in copy.checkpoints()] == [2, 4]
    copy.save(5, lambda folder: None, keep=1, best=True)
    assert best.resolve().name == "step_000005"
    assert [step_of(saved) for saved in copy.checkpoints()] == [5]


def test_a_best_that_is_nowhere_else_is_replaced_by_the_next(run: RunFolder) -> None:
    (run.path / "checkpoints" / "best").mkdir()
    run.save(1, torch_save, keep=1)
    run.rewind(1)
    run.save(2, torch_save, keep=1, best=True)
    assert (run.path / "checkpoints" / "best").resolve().name == "step_000002"


def test_what_a_library_could_not_read_is_not_said_of_the_place_that_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="has no file named config"), put("out", tmp_path):
        raise OSError("the folder has no file named config.json")  # as transformers says it, without a number
    with (
        pytest.raises(CheckpointError, match=r"out: .* cannot be written \(File name too long\)"),
        put("out", tmp_path),
    ):
        (tmp_path / ("x" * 300)).write_text("")
