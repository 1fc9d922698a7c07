"""A learner on disk: a Hugging Face folder that any tool can load, and the optimizer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llm_gym.chat import load_tokenizer
from llm_gym.errors import CheckpointError
from llm_gym.harness.learner import Learner
from llm_gym.policies.model import copy_weights

STATE = "trainer.pt"


def export(model: Any, tokenizer: str | Path | None, folder: Path) -> None:
    """Writes weights (or the adapter), config and tokenizer: `llmgym eval --model <folder>` takes it."""
    model.save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)


def save(learner: Learner, tokenizer: str | Path | None, folder: Path) -> None:
    """Everything that training needs to go on bit for bit."""
    export(learner.model, tokenizer, folder)
    torch.save(learner.state_dict(), folder / STATE)


def restore(learner: Learner, folder: Path) -> None:
    """Reads back what `save` wrote, into the learner's own tensors.

    Raises:
        CheckpointError: a file is missing or of another model.
    """
    try:
        tensors = read_tensors(folder)
        if hasattr(learner.model, "peft_config"):
            import peft

            peft.set_peft_model_state_dict(learner.model, tensors)
        else:
            copy_weights(learner.model, tensors.items())
        learner.load_state_dict(torch.load(folder / STATE, weights_only=True))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {str(folder)!r} cannot be read ({error}).") from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights (or the adapter) in a folder, by name."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
