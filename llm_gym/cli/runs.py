"""Run folders and checkpoints, as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_gym.errors import CheckpointError
from llm_gym.report.transcripts import Decode


def run_of(path: str | None) -> Path | None:
    """The run folder of `llmgym train` that `path` is, or that the checkpoint `path` lies in; else None."""
    from llm_gym.harness.lineage import last_stage

    for folder in () if path is None else (last_stage(Path(path)), Path(path).parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file() and not _of_sft(folder):
            return folder
    return None


def model_path(path: str | None) -> str | None:
    """What to load for `--model`: of a run folder what it trained, anything else as it is.

    Raises:
        CheckpointError: the run has saved nothing yet.
    """
    from llm_gym.harness.checkpoint import RunFolder
    from llm_gym.harness.lineage import last_stage

    if path is None:
        return None
    path = str(last_stage(Path(path))) if Path(path).is_dir() else path
    if _of_sft(Path(path)):
        return str(Path(path) / "model")
    if run_of(path) != Path(path):
        return path
    saved = RunFolder(path).checkpoints()
    if not saved:
        raise CheckpointError(f"model: the run {path!r} has no checkpoint yet.")
    return str(saved[-1])


def _of_sft(folder: Path) -> bool:
    """Whether the folder is a run of `llmgym sft`, which ends in one model."""
    return (folder / "config.yaml").is_file() and (folder / "model").is_dir()


def decoder(run: Path) -> Decode | None:
    """The run's tokenizer as a function from ids to text; None if it cannot be had."""
    from llm_gym.chat import load_tokenizer
    from llm_gym.harness.checkpoint import RunFolder
    from llm_gym.report.run import read

    saved = RunFolder(run).checkpoints()
    try:
        tokenizer = load_tokenizer(saved[-1] if saved else read(run).config.get("model"))
    except Exception:
        return None

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode
