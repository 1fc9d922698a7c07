"""A transformers model as the built-in engine sees it: where it comes from, its limits, its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from llm_gym.embedded import PATH
from llm_gym.errors import PolicyError, SettingError
from llm_gym.models.plain import fold, load_base, no_progress_bar

log = logging.getLogger(__name__)


def load_for_inference(
    source: str | Path | None, device: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A causal language model, in evaluation mode.

    Args:
        source: a folder or hub id, of a model or an adapter, which is then folded in; None: the embedded model.
        device: None: CUDA if there is one, else the CPU.
        dtype: None: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        SettingError: there is no such model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        with no_progress_bar():
            model = load_base(source or PATH, dtype=dtype)
            if hasattr(model, "peft_config"):  # an adapter of the hub
                model = fold(source or PATH).to(dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SettingError(f"model: cannot load {str(source or PATH)!r}: {reason}") from error
    loaded: nn.Module = model.to(device).eval()
    return loaded


def limit_of(model: nn.Module, wanted: int | None) -> int:
    """The longest context that is wanted, as far as the model has positions for it.

    Raises:
        SettingError: `wanted` exceeds what the model can do.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise SettingError(f"model: {type(model).__name__} is an encoder-decoder; the built-in engine wants a decoder.")
    most = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)
    length = wanted if wanted is not None else most
    if not 1 < length <= most:
        raise SettingError(f"max_context: got {length}, the model's limit is {most} (and the least is 2).")
    return length


def stop_ids_of(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: those of the generation config, and the tokenizer's."""
    generation: Any = getattr(model, "generation_config", None)
    found: set[int] = set()
    for ids in (getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return tuple(sorted(found))


def copy_weights(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies named tensors into the model's parameters, and into buffers that are saved with them, all or nothing.

    Raises:
        PolicyError: a name is unknown or missing, or a shape differs.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    every = {**model.state_dict(keep_vars=True), **parameters}
    given = dict(tensors)
    if extra := sorted(given.keys() - every.keys()):
        raise PolicyError(f"load: {len(extra)} unknown names, the first is {extra[0]!r}.")
    covered = {id(every[name]) for name in given}
    if missing := sorted(name for name, parameter in parameters.items() if id(parameter) not in covered):
        raise PolicyError(f"load: {len(missing)} weights are missing, the first is {missing[0]!r}.")
    for name, tensor in given.items():
        if tensor.shape != every[name].shape:
            raise PolicyError(f"load: {name!r} has shape {list(tensor.shape)}, want {list(every[name].shape)}.")
    with torch.no_grad():
        for name, tensor in given.items():
            every[name].copy_(tensor)


SMALL = 20_000_000
"""Parameters below which a second CPU thread costs more (waiting for it) than it computes."""


def set_threads(model: nn.Module, wanted: int | None = None) -> None:
    """Sets torch's CPU threads: as wanted; None: one for a small model, torch's own choice for others."""
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        torch.set_num_threads(1)
