"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most a step.

config.yaml                    complete, re-runnable
config.until_000010.yaml       the settings up to that step, where the run went on with other ones
provenance.yaml                a list of the run's starts: versions, commits, machine
metrics.jsonl                  a row a step; row 0 is the evaluation before the first step
timeline.jsonl                 a row a step: when each phase, and each group that it trained on, began and ended
episodes/step_000012.jsonl     the step's episodes, those that were trained on
         dropped_000012.jsonl  those of groups that a filter left out
         failed_000012.jsonl   those of a step that could not be played
         eval_000000.jsonl     those of an evaluation; of a mixture eval_000000_<name>.jsonl
checkpoints/step_000020/       a Hugging Face folder (weights, tokenizer) and trainer.pt
checkpoints/best               a link to the one with the best evaluation, if the run keeps it
lock                           held by the process that writes here
report.html
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from llm_gym.core import Episode
from llm_gym.episode_files import decode, encode
from llm_gym.errors import CheckpointError, LLMGymError
from llm_gym.harness.runs import lock


class RunFolder:
    """Reads and writes one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file, self.timeline_file = self.path / "metrics.jsonl", self.path / "timeline.jsonl"

    def hold(self) -> None:
        """Makes the folder, and keeps every other process from writing here until `release`, or the end of this one.

        Raises:
            CheckpointError: another process does, or nothing can be written here.
        """
        try:
            for folder in ("episodes", "checkpoints"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            lock.hold(self.path / "lock")
        except OSError as error:
            what = error.strerror if self.path.is_dir() or not self.path.exists() else "it is a file"
            raise CheckpointError(f"out: {str(self.path)!r} cannot be a run folder ({what}).") from error

    def release(self) -> None:
        """Lets others write here; may be called twice."""
        lock.release(self.path / "lock")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around everything that writes here: one sentence where it cannot.

        Raises:
            CheckpointError: a full disk, a folder that is gone or read-only; says what is whole and how to go on.
        """
        try:
            yield
        except LLMGymError:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:  # of torch.save's writer, in C++
            raise CheckpointError(self._lost(error)) from error

    def start(self, config_yaml: str) -> None:
        """Begins a new run here; the folder is then held.

        Raises:
            CheckpointError: the folder already holds one that has begun (a configuration alone is none).
        """
        if self.metrics_file.exists():
            raise CheckpointError(f"out: {str(self.path)!r} already holds a run; pass --resume, or another folder.")
        self.hold()
        self.write_config(config_yaml)

    def write_config(self, config_yaml: str) -> None:
        """Replaces config.yaml."""
        with self.writing():
            write_atomically(self.config_file, config_yaml)

    def change_config(self, config_yaml: str, step: int) -> None:
        """Replaces config.yaml from the step after `step` on; what was true up to there stays (see `config_of`)."""
        before = self.config_of(step).read_text("utf-8")
        for later, file in self._former():
            if later > step or not step:
                file.unlink()
        if step and before != config_yaml:
            with self.writing():
                write_atomically(self.path / f"config.until_{step:06d}.yaml", before)
        self.write_config(config_yaml)

    def config_of(self, step: int) -> Path:
        """The settings with which a step was trained."""
        return next((file for until, file in self._former() if until >= step), self.config_file)

    def _former(self) -> list[tuple[int, Path]]:
        """The settings that were replaced, and the last step of each, in order."""
        return sorted((int(f.stem.rpartition("_")[2]), f) for f in self.path.glob("config.until_*.yaml"))

    def add_provenance(self, start: Mapping[str, Any]) -> None:
        """Adds a start to the list in provenance.yaml: a resumed run may go on with other versions."""
        with self.writing(), (self.path / "provenance.yaml").open("a", encoding="utf-8") as file:
            file.write(yaml.safe_dump([dict(start)], sort_keys=False, allow_unicode=True))

    def rewind(self, step: int) -> None:
        """Forgets every row and episode file after `step`, and what a kill left half-written."""
        with self.writing():
            for table in (self.metrics_file, self.timeline_file):
                rows = [row for row in _rows(table) if row["step"] <= step]
                write_atomically(table, "".join(_line(row) for row in rows))
            for file in (self.path / "episodes").glob("*.jsonl*"):
                if file.suffix != ".jsonl" or int(file.stem.split("_")[1]) > step:
                    file.unlink()
            for folder in (self.path / "checkpoints").glob(".partial-step_*"):
                shutil.rmtree(folder)
            if not self._best.exists():
                self._best.unlink(missing_ok=True)  # it was to point at a checkpoint that never appeared
            elif not self._best.is_symlink():
                self._link_again()

    def metrics(self) -> list[dict[str, Any]]:
        """The rows written so far; a last line cut by a kill is ignored."""
        return _rows(self.metrics_file)

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one row; values that JSON has no number for become null."""
        with self.writing(), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def log_timeline(self, row: Mapping[str, Any]) -> None:
        """Appends one row to the timeline."""
        with self.writing(), self.timeline_file.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def write_episodes(self, name: str, episodes: Iterable[Episode]) -> None:
        """Writes episodes, one JSON object a line, as `episodes/<name>.jsonl`."""
        lines = (json.dumps(encode(episode)) + "\n" for episode in episodes)
        with self.writing():
            write_atomically(self.path / "episodes" / f"{name}.jsonl", lines)

    def best(self, metric: str) -> int | None:
        """The step whose row has the largest value of a metric, the first of several; None if no row has one.

        Row 0 does not count: nothing is saved before the first step.
        """
        found = [(row[metric], -row["step"]) for row in self.metrics() if row["step"] and row.get(metric) is not None]
        return -max(found)[1] if found else None

    def steps_played(self) -> list[int]:
        """The steps whose episodes are here, ascending; step 12 is `read_episodes("step_000012")`."""
        return sorted(int(f.stem.removeprefix("step_")) for f in (self.path / "episodes").glob("step_*.jsonl"))

    def read_episodes(self, name: str) -> list[Episode]:
        """What `write_episodes` wrote, equal to the last bit.

        Raises:
            CheckpointError: there is no such file, or it does not hold episodes.
        """
        file = self.path / "episodes" / f"{name}.jsonl"
        try:
            return [decode(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"episodes: {str(file)!r} cannot be read ({type(error).__name__}: {error})."
            ) from error

    def save(self, step: int, write: Callable[[Path], None], *, keep: int, best: bool = False) -> Path:
        """Writes the checkpoint of `step` through `write(folder)`: it appears whole or not at all.

        The newest `keep` stay (0: all), and that last saved with `best`, which `checkpoints/best` points at.
        """
        final = self._checkpoint(step)
        partial = _partial(final)
        with self.writing():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
                for file in partial.rglob("*"):
                    _sync(file)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
                raise
            shutil.rmtree(final, ignore_errors=True)
            if best:
                self._point_best_at(final)
            os.replace(partial, final)
            _sync(final.parent)
            saved = self.checkpoints()
            for old in saved[: len(saved) - keep] if keep > 0 else ():
                if old.name != self._best.resolve().name:
                    shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    @property
    def _best(self) -> Path:
        return self.path / "checkpoints" / "best"

    def _point_best_at(self, checkpoint: Path) -> None:
        if self._best.is_dir() and not self._best.is_symlink():
            shutil.rmtree(self._best)  # a copy; see `_link_again`
        link = checkpoint.with_name(".partial-best")
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        os.replace(link, self._best)

    def _link_again(self) -> None:
        """Whoever copied the folder has followed the link: of what is there twice, `best` is a link again."""
        for saved in self.checkpoints():
            names = sorted(str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file())
            if names and not any(filecmp.cmpfiles(saved, self._best, names, shallow=False)[1:]):
                self._point_best_at(saved)
                return

    def _lost(self, error: BaseException) -> str:
        """What to say where something could not be written."""
        saved = self.checkpoints()
        whole = f"the checkpoint of step {step_of(saved[-1])} is whole" if saved else "there is no checkpoint yet"
        if not self.path.is_dir():
            return (
                f"run folder: {str(self.path)!r} is gone (deleted or renamed?), and the run cannot go on without; put "
                "it back, or give its new name, and go on from its newest checkpoint with --resume --out."
            )
        what = f"{error.strerror}: {error.filename or self.path}" if isinstance(error, OSError) else str(error)
        return (
            f"run folder: {str(self.path)!r} cannot be written ({what}); {whole}. When that is mended, go on with "
            f"--resume --out {self.path}"
        )

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"


class NonZeroRankRunFolder(RunFolder):
    """The run folder as every process but the first sees it: to read, and to write its part of a checkpoint."""

    def hold(self) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""

    def write_config(self, config_yaml: str) -> None:
        """Nothing."""

    def add_provenance(self, start: Mapping[str, Any]) -> None:
        """Nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_timeline(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_episodes(self, name: str, episodes: Iterable[Episode]) -> None:
        """Goes through them: those played here are sent to the process that writes (see `distributed.groups`)."""
        deque(episodes, maxlen=0)

    def save(self, step: int, write: Callable[[Path], None], *, keep: int, best: bool = False) -> Path:
        """Writes this process's part into the folder that the first one has made, and will name."""
        final = self._checkpoint(step)
        with self.writing():
            write(_partial(final))
        return final


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder holds."""
    return int(checkpoint.name.removeprefix("step_"))


@contextmanager
def put(setting: str, path: Path) -> Iterator[None]:
    """Around what writes a file or a folder that is no part of a run: one sentence where it cannot.

    Args:
        setting: what the sentence calls it.
        path: where it is to be.

    Raises:
        CheckpointError: a full disk, or a place that is read-only or cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a library's word for something that it could not read
        why = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{setting}: {str(path)!r} cannot be written ({why}); name another place.") from error


def write_atomically(file: Path, text: str | Iterable[str]) -> None:
    """Replaces `file` whole, by a text or its parts: a kill leaves the old one or the new one."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as opened:
        opened.writelines([text] if isinstance(text, str) else text)
    _sync(partial)
    os.replace(partial, file)


def _partial(final: Path) -> Path:
    return final.with_name(f".partial-{final.name}")


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a table; a last line cut by a kill is ignored."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def _line(row: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
