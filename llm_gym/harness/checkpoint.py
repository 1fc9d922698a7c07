"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most a step.

config.yaml                    complete, re-runnable
provenance.yaml                a list of the run's starts: versions, commits, machine
metrics.jsonl                  a row a step; row 0 is the evaluation before the first step
episodes/step_000012.jsonl     the step's episodes; eval_000000.jsonl: evaluation transcripts
checkpoints/step_000020/       a Hugging Face folder (weights, tokenizer) and trainer.pt
checkpoints/best               a link to the one with the best evaluation, if the run keeps it
report.html
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llm_gym.core import Episode
from llm_gym.errors import CheckpointError


class RunFolder:
    """Reads and writes one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"

    def start(self, config_yaml: str) -> None:
        """Begins a new run here.

        Raises:
            CheckpointError: the folder already holds one that has begun (a configuration alone is none).
        """
        if self.metrics_file.exists():
            raise CheckpointError(f"out: {str(self.path)!r} already holds a run; pass --resume, or another folder.")
        for folder in ("episodes", "checkpoints"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        self.write_config(config_yaml)

    def write_config(self, config_yaml: str) -> None:
        """Replaces config.yaml; a resumed run may have been given more steps."""
        write_atomically(self.config_file, config_yaml)

    def add_provenance(self, start: Mapping[str, Any]) -> None:
        """Adds a start to the list in provenance.yaml: a resumed run may go on with other versions."""
        with (self.path / "provenance.yaml").open("a", encoding="utf-8") as file:
            file.write(yaml.safe_dump([dict(start)], sort_keys=False, allow_unicode=True))

    def rewind(self, step: int) -> None:
        """Forgets every row and episode file after `step`, and what a kill left half-written."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_atomically(self.metrics_file, "".join(_line(row) for row in rows))
        for file in (self.path / "episodes").glob("*.jsonl*"):
            if file.suffix != ".jsonl" or int(file.stem.split("_")[1]) > step:
                file.unlink()
        for folder in (self.path / "checkpoints").glob(".partial-step_*"):
            shutil.rmtree(folder)
        if not self._best.exists():
            self._best.unlink(missing_ok=True)  # it was to point at a checkpoint that never appeared

    def metrics(self) -> list[dict[str, Any]]:
        """The rows written so far; a last line cut by a kill is ignored."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one row; values that JSON has no number for become null."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def write_episodes(self, name: str, episodes: Iterable[Episode]) -> None:
        """Writes episodes, one JSON object a line, as `episodes/<name>.jsonl`."""
        text = "".join(json.dumps(episode.to_dict()) + "\n" for episode in episodes)
        write_atomically(self.path / "episodes" / f"{name}.jsonl", text)

    def best(self, metric: str) -> int | None:
        """The step whose row has the largest value of a metric, the first of several; None if no row has one.

        Row 0 does not count: nothing is saved before the first step.
        """
        found = [(row[metric], -row["step"]) for row in self.metrics() if row["step"] and row.get(metric) is not None]
        return -max(found)[1] if found else None

    def read_episodes(self, name: str) -> list[Episode]:
        """What `write_episodes` wrote, equal to the last bit.

        Raises:
            CheckpointError: there is no such file, or it does not hold episodes.
        """
        file = self.path / "episodes" / f"{name}.jsonl"
        try:
            return [Episode.from_dict(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"episodes: {str(file)!r} cannot be read ({type(error).__name__}: {error})."
            ) from error

    def save(self, step: int, write: Callable[[Path], None], *, keep: int, best: bool = False) -> Path:
        """Writes the checkpoint of `step` through `write(folder)`: it appears whole or not at all.

        The newest `keep` stay, and the one that was last saved with `best`, which `checkpoints/best` points at.
        """
        final = self._checkpoint(step)
        partial = _partial(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.rglob("*"):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        if best:
            link = partial.with_name(".partial-best")
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            os.replace(link, self._best)
        os.replace(partial, final)
        _sync(final.parent)
        for old in self.checkpoints()[:-keep]:
            if old.name != self._best.resolve().name:
                shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    @property
    def _best(self) -> Path:
        return self.path / "checkpoints" / "best"

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"


class Follower(RunFolder):
    """The run folder as every process but the first sees it: to read, and to write its part of a checkpoint."""

    def write_config(self, config_yaml: str) -> None:
        """Nothing."""

    def add_provenance(self, start: Mapping[str, Any]) -> None:
        """Nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_episodes(self, name: str, episodes: Iterable[Episode]) -> None:
        """Nothing."""

    def save(self, step: int, write: Callable[[Path], None], *, keep: int, best: bool = False) -> Path:
        """Writes this process's part into the folder that the first one has made, and will name."""
        final = self._checkpoint(step)
        write(_partial(final))
        return final


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder holds."""
    return int(checkpoint.name.removeprefix("step_"))


def write_atomically(file: Path, text: str) -> None:
    """Replaces `file` whole: a kill leaves the old one or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, file)


def _partial(final: Path) -> Path:
    return final.with_name(f".partial-{final.name}")


def _line(row: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
