"""Where a model comes from: the run folder that holds it, and the runs before that one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_gym.errors import CheckpointError
from llm_gym.harness.runs.run_folder import RunFolder, step_of

STAGES = "stages.yaml"
"""File in the folder of several runs."""


@dataclass(frozen=True, slots=True)
class Source:
    """A saved model of a run."""

    run: Path
    """The run folder."""
    folder: Path
    """The checkpoint, a Hugging Face folder."""
    step: int
    config: Mapping[str, Any]
    """The run's configuration."""

    @property
    def kind(self) -> str:
        """What made it: `sft`, `distill` or `train`."""
        return "sft" if "examples_per_step" in self.config else "distill" if self.config.get("distill") else "train"

    @property
    def base(self) -> str | None:
        """The model that the run began with; None: the embedded one."""
        found: str | None = self.config.get("model")
        return found

    @property
    def tuned(self) -> bool:
        """Whether the checkpoint is an adapter on `base`."""
        return (self.folder / "adapter_config.json").is_file()


def last_stage(folder: Path) -> Path:
    """Of a folder of stages the newest one that has saved something; any other folder as it is."""
    if not (folder / STAGES).is_file():
        return folder
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d+-\w+", p.name) and RunFolder(p).checkpoints()]
    return max(found, key=lambda p: int(p.name.partition("-")[0]), default=folder)


def locate(path: str | Path, step: int | None = None) -> Source:
    """The saved model that a run folder, or a checkpoint in one, holds.

    Args:
        path: the folder; of a folder of stages, the last stage.
        step: of a run folder's checkpoints; None: the newest.

    Raises:
        CheckpointError: no run is there, or it has no such checkpoint.
    """
    folder = last_stage(Path(path))
    inside = folder.resolve().parent.parent
    if (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        saved = {step_of(found): found for found in run.checkpoints()}
        if not saved:
            raise CheckpointError(f"run: {str(path)!r} has no checkpoint yet.")
        if step is not None and step not in saved:
            raise CheckpointError(
                f"step: got {step}, but {str(path)!r} has checkpoints of {', '.join(map(str, saved))}."
            )
        chosen = max(saved) if step is None else step
        return Source(run.path, saved[chosen], chosen, _config(run))
    if (inside / "config.yaml").is_file() and folder.resolve().name.startswith("step_"):
        return Source(inside, folder, step_of(folder.resolve()), _config(RunFolder(inside)))
    raise no_run(path)


def no_run(path: str | Path) -> CheckpointError:
    """Says that no run is there."""
    what = "is no run folder and no checkpoint of one" if Path(path).exists() else "does not exist"
    return CheckpointError(f"run: {str(path)!r} {what}.")


def lineage(source: Source, most: int = 16) -> list[Source]:
    """The runs that led to a model, the first first."""
    found = [source]
    while len(found) < most and found[0].base is not None:
        base = Path(found[0].base)
        try:
            before = locate(base.parent if base.name in ("model", "merged") else base)
        except CheckpointError:
            break
        found.insert(0, before)
    return found


def _config(run: RunFolder) -> Mapping[str, Any]:
    data = yaml.safe_load(run.config_file.read_text("utf-8"))
    return data if isinstance(data, dict) else {}


def run_of(path: str | None) -> Path | None:
    """The run folder of `llmgym train` that `path` is, or that the checkpoint `path` lies in; else None."""
    for folder in () if path is None else (last_stage(Path(path)), Path(path).parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file() and not _of_sft(folder):
            return folder
    return None


def model_path(path: str | None, setting: str = "model") -> str | None:
    """What to load where a model is asked for: of a run folder what it trained, anything else as it is.

    `setting` is what errors call it.

    Raises:
        CheckpointError: the run has saved nothing yet.
    """
    if path is None:
        return None
    path = str(last_stage(Path(path))) if Path(path).is_dir() else path
    if _of_sft(Path(path)):
        return str(Path(path) / "model")
    if run_of(path) != Path(path):
        return path
    saved = RunFolder(path).checkpoints()
    if not saved:
        raise CheckpointError(f"{setting}: the run {path!r} has no checkpoint yet.")
    return str(saved[-1])


def _of_sft(folder: Path) -> bool:
    """Whether the folder is a run of `llmgym sft`, which ends in one model."""
    return (folder / "config.yaml").is_file() and (folder / "model").is_dir()
