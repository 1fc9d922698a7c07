"""What the built-in engine needs to know of a transformers model, and the proof that it can serve it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_gym.embedded import PATH
from llm_gym.errors import PolicyError, SettingError
from llm_gym.policies.kv_cache import ATTENTION, Layout, SlotCache, attention

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Most difference between cached and plain logits, in standard deviations of the logits; 0.2 in half precision."""


def load_model(source: str | Path | None, device: str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model, in evaluation mode.

    Args:
        source: a folder or hub id; None: the embedded model.
        device: None: CUDA if there is one, else the CPU.
        dtype: None: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        SettingError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(str(source or PATH), dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SettingError(f"model: cannot load {str(source or PATH)!r}: {reason}") from error
    return model.to(device).eval()


def max_context_of(model: nn.Module, wanted: int | None) -> int:
    """The longest context to serve.

    Raises:
        SettingError: `wanted` exceeds what the model can do, or a layer would not see all of it.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise SettingError(f"model: {type(model).__name__} is an encoder-decoder; the built-in engine wants a decoder.")
    most = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    length = wanted if wanted is not None else most
    if not 1 < length <= most:
        raise SettingError(f"max_context: got {length}, the model's limit is {most} (and the least is 2).")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (getattr(config, "layer_types", None) is None and window)
    if slides and window and window < length:
        raise SettingError(f"max_context: got {length}, but the model's sliding window is {window}; pass at most that.")
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise SettingError(f"model: the built-in engine cannot serve layers of type {sorted(other)[0]!r}.")
    return length


def stop_ids_of(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: those of the generation config, and the tokenizer's."""
    generation: Any = getattr(model, "generation_config", None)
    found: set[int] = set()
    for ids in (getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return tuple(sorted(found))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; the modules that were training are training again at the end."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def probe(model: nn.Module, autocast_dtype: torch.dtype | None) -> Layout:
    """Learns the shape of the model's cache, and proves on two short sequences that cached logits are the plain ones.

    Raises:
        SettingError: they are not, or the model works in a way that the engine does not know.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (2, 6))).to(device)
    with evaluating(model), torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext():
        with attention(model, "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"):
            plain = model(input_ids=ids, use_cache=True)
        layout = _layout(model, plain.past_key_values, autocast_dtype, device)
        with attention(model, ATTENTION):
            cached = _cached_logits(model, layout, ids)
    want = torch.stack([plain.logits[0, 5], plain.logits[1, 2]]).double()
    error = (cached.double() - want).abs().max() / want.std().clamp_min(1e-12)
    if not error <= TOLERANCE.get(layout.dtype, 0.2):
        raise SettingError(
            f"model: the built-in engine cannot serve {type(model).__name__}; its cached logits are off by "
            f"{error:.2g} standard deviations."
        )
    return layout


def _layout(model: nn.Module, past: Any, autocast_dtype: torch.dtype | None, device: torch.device) -> Layout:
    layers = getattr(past, "layers", None) or []
    shapes = {
        (tuple(layer.keys.shape), tuple(layer.values.shape))
        for layer in layers
        if getattr(layer, "keys", None) is not None
    }
    if len(shapes) != 1 or any(getattr(layer, "keys", None) is None for layer in layers):
        raise SettingError(f"model: the built-in engine cannot serve {type(model).__name__}; its cache is not uniform.")
    keys, values = shapes.pop()
    return Layout(len(layers), keys[1], keys[3], values[3], autocast_dtype or layers[0].keys.dtype, device)


def _cached_logits(model: nn.Module, layout: Layout, ids: torch.Tensor) -> torch.Tensor:
    """The last logits of ids[0] and ids[1, :3], fed in two uneven pieces (4 + 2, and 1 + 2 with padding)."""
    cache = SlotCache(layout)
    cache.resize(2, 8)
    pieces = (
        (np.array([[0, 1, 2, 3], [-1, -1, -1, 0]]), [[0, 1, 2, 3], [0, 0, 0, 0]]),
        (np.array([[4, 5], [1, 2]]), [[4, 5], [1, 2]]),
    )
    for positions, columns in pieces:
        cache.aim(slice(0, 2), positions)
        seen = torch.from_numpy(np.maximum(positions, 0)).to(layout.device)
        hidden = torch.arange(int(positions.max()) + 1, device=layout.device) > seen[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=layout.dtype, device=layout.device).masked_fill_(hidden, -torch.inf)
        output = model(
            input_ids=ids.gather(1, torch.tensor(columns, device=layout.device)),
            attention_mask=mask,
            position_ids=seen,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def copy_weights(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies named tensors into the model's parameters; everything is checked before anything is written.

    Raises:
        PolicyError: a name is unknown or missing, or a shape differs.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    given = dict(tensors)
    if extra := sorted(given.keys() - every.keys()):
        raise PolicyError(f"load: {len(extra)} unknown names, the first is {extra[0]!r}.")
    covered = {id(every[name]) for name in given}
    if missing := sorted(name for name, parameter in every.items() if id(parameter) not in covered):
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
