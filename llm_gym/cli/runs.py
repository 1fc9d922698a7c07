"""A run's tokenizer, for those who read its episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_gym.report.transcripts import Decode


def decoder(run: Path) -> Decode | None:
    """The run's tokenizer as a function from ids to text; None if it cannot be had."""
    from llm_gym.chat import load_tokenizer
    from llm_gym.harness.runs.run_folder import RunFolder
    from llm_gym.report.run import read

    saved = RunFolder(run).checkpoints()
    try:
        tokenizer = load_tokenizer(saved[-1] if saved else read(run).config.get("model"))
    except Exception:
        return None

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode
