"""A learner on disk: a Hugging Face folder that any tool can load, and the optimizer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llm_gym.chat import load_tokenizer
from llm_gym.errors import CheckpointError
from llm_gym.harness.distributed.fsdp import load_parts, save_parts, split_as, split_state, whole_state
from llm_gym.models.loading import copy_weights
from llm_gym.models.plain import no_progress_bar, plain_class, plain_config, record_base

if TYPE_CHECKING:
    from llm_gym.harness.learner.learner import Learner

STATE, PARTS = "trainer.pt", "trainer"
"""The optimizer's file; for a learner that is split over processes, the folder with each one's part."""


def export(model: Any, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes weights (or the adapter), config and tokenizer: `llmgym eval --model <folder>` takes it.

    `state`: the model's state dict, if its own tensors are not whole.
    """
    given: dict[str, Any] = {} if state is None else {"state_dict": state}
    if hasattr(model, "peft_config"):
        given["save_embedding_layers"] = False  # an adapted embedding's frozen weights are the base's
    model.save_pretrained(folder, **given)
    if hasattr(model, "peft_config"):
        record_base(model, folder)
    load_tokenizer(tokenizer).save_pretrained(folder)


def save(learner: Learner, tokenizer: Any, folder: Path) -> None:
    """Everything that training needs to go on bit for bit; every process of the run calls it with the same folder.

    `tokenizer`: what `load_tokenizer` takes; its chat template is saved with it.
    """
    world = learner.world
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    world.meet("checkpoint")  # the folder exists
    with world.blame_lost_rank("checkpoint"):
        state = whole_state(learner.model) if world.sharded else None
        if world.rank == 0:
            export(learner.model, tokenizer, folder, state)
        if world.sharded:
            save_parts(learner, folder / PARTS)
    if not world.sharded and world.rank == 0:
        torch.save(learner.state_dict(), folder / STATE)
    world.meet("checkpoint written")


def restore(learner: Learner, folder: Path) -> None:
    """Reads back what `save` wrote, into the learner's own tensors; more or fewer processes may have written it.

    Peak rates, betas and decay are no state: they stay as the learner's settings say. The rate of the last step is,
    for a step that trains nothing leaves it.

    Raises:
        CheckpointError: a file is missing or of another model.
    """
    options = [[dict(group) for group in optimizer.param_groups] for optimizer in learner.optimizers]
    try:
        like = next(learner.model.parameters())
        if hasattr(learner.model, "peft_config"):
            import peft

            tensors = {name: split_as(tensor, like) for name, tensor in read_tensors(folder).items()}
            peft.set_peft_model_state_dict(learner.model, tensors)
        else:
            read = in_memory(learner.model, read_tensors(folder))
            copy_weights(learner.model, ((name, split_as(tensor, like)) for name, tensor in read.items()))
        if (folder / PARTS).is_dir():
            load_parts(learner, folder / PARTS)
        else:
            learner.load_state_dict(torch.load(folder / STATE, weights_only=True))
            for optimizer in learner.optimizers:
                split_state(optimizer)
        for optimizer, own in zip(learner.optimizers, options, strict=True):
            for group, option in zip(optimizer.param_groups, own, strict=True):
                group.update({name: value for name, value in option.items() if name not in ("params", "lr")})
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {str(folder)!r} cannot be read ({error}).") from error


def in_memory(model: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights as `save_pretrained` wrote them, by the names and in the form that they have in memory.

    These differ for some models: experts are fused in memory, and stand apart on disk.

    Raises:
        ValueError: they are not all of the model's.
    """
    if tensors.keys() <= model.state_dict().keys():
        return tensors
    kind = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
    how = {"config": plain_config(model), "state_dict": dict(tensors), "dtype": kind, "output_loading_info": True}
    with no_progress_bar():
        plain, found = plain_class(model).from_pretrained(None, **how)
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise ValueError(f"{wrong[0]!r} and {len(wrong) - 1} more weights are missing, or another model's")
    read: dict[str, Tensor] = plain.state_dict()
    return read


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights (or the adapter) in a folder, by name."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
