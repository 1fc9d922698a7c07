"""The plain weights of a trained model: adapters folded in, one tensor at a time.

Everything that leaves a learner (weights sent to an engine, a merged model, an export, an evaluation) goes through
`plain_tensors`. It walks over modules and looks beneath peft's wrappers, so names are those of the plain model
whatever was wrapped, and however often. What an adapter adds is formed and added in float32 at least.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def base_of(model: Any) -> Any:
    """The transformers model itself, without peft around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@torch.no_grad()
def plain_tensors(model: Any, *, adapters: bool = True, consume: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights by their names in the plain model, one tensor at a time.

    Tensors that are split over several processes come whole; then all of these must go through them together.

    Args:
        model: a transformers model, or a peft model around it. Frozen weights may be in half precision or 4 bits.
        adapters: fold adapters in; else leave them out.
        consume: each weight that an adapter was folded into is freed: the model is of no use afterwards.

    Yields:
        Names and tensors: folded ones in float32 at least, the others in the type that they are held in.
    """
    base = base_of(model)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what was gathered for a forward may be older than the parts
    shared = {id(weight) for weight in _ends(base)} if consume else set()
    for place in places(base, adapters=adapters):
        yield place.name, whole(_adapted(place.leaf, place.parameter, place.around).detach())
        tensor = getattr(place.leaf, place.parameter)
        if consume and place.around and id(tensor) not in shared:
            tensor.data = torch.empty(0)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the plain model comes from."""

    name: str
    """The tensor's, in the plain model."""
    leaf: Any
    """The plain module that holds it."""
    parameter: str
    """Its name there."""
    around: list[Any]
    """The adapters around `leaf`, the innermost first."""


def places(module: nn.Module, path: str = "", *, adapters: bool = True) -> Iterator[Place]:
    """Where the parameters and buffers of a plain model are, in a model with peft's wrappers in it."""
    leaf, around = beneath(module, adapters=adapters)
    if not all(map(_is_lora, around)):
        leaf, around = _merged_copy(module), []
    transient = leaf._non_persistent_buffers_set
    for name in [*leaf._parameters, *(name for name in leaf._buffers if name not in transient)]:
        if getattr(leaf, name) is not None:
            yield Place(path + name, leaf, name, around)
    for name, child in leaf.named_children():
        yield from places(child, f"{path}{name}.", adapters=adapters)


def untied(model: Any) -> bool:
    """Whether embedding and head, one matrix in the base model, are two in the plain one: an adapter is on one."""
    base = base_of(model)
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    return bool(tied) and None not in ends and any(beneath(end)[0] is not end for end in ends)


def apart(model: Any) -> bool:
    """Whether every adapter is on a linear layer of the decoder, where engines can hold one apart from the weights."""
    base = base_of(model)
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    linear = all(isinstance(p.leaf, nn.Linear) for p in places(base) if p.around)
    return linear and all(beneath(end)[0] is end for end in ends)


def weight_of(layer: Any, *, adapters: bool = True) -> Tensor:
    """The weight that a layer acts with, in the shape that it is stored in, adapters folded in; differentiable.

    Of frozen weights in half precision or 4 bits the result is float32, so that a small adapter is not rounded away.
    """
    leaf, around = beneath(layer, adapters=adapters)
    return _adapted(leaf, "weight", around)


def beneath(module: Any, *, adapters: bool = True) -> tuple[Any, list[Any]]:
    """The plain module within peft's wrappers, and the adapters that act on it, the innermost first.

    Of a module that is trained whole beside adapters (`modules_to_save`) it is the copy that acts.

    Args:
        module: any module.
        adapters: False leaves out all adapters and trained copies, True those that are disabled.
    """
    around: list[Any] = []
    while True:
        acts = adapters and not getattr(module, "disable_adapters", True)
        if "modules_to_save" in module._modules and "original_module" in module._modules:
            copies = [module.modules_to_save[n] for n in module.active_adapters if n in module.modules_to_save]
            module = copies[0] if acts and copies else module.original_module
        elif "base_layer" in module._modules:
            around = [module, *around] if acts else around
            module = module.base_layer
        else:
            return module, around


def numbers(leaf: Any, name: str = "weight") -> Tensor:
    """A parameter as numbers: out of its 4 bits if it is held so, and then whole, even if it is split."""
    tensor: Tensor = getattr(leaf, name)
    state = getattr(leaf, "quant_state", None) if name == "weight" else None
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        tensor = dequantize_4bit(whole(tensor).data, state)
    return tensor


@torch.no_grad()
def whole(tensor: Any) -> Any:
    """The whole of a tensor that may be split (anything else as it is); every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Inside


def _ends(base: Any) -> list[Any]:
    """The weights of embedding and head, which may be one."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return [beneath(end, adapters=False)[0].weight for end in ends if end is not None]


def _adapted(leaf: Any, name: str, around: list[Any]) -> Tensor:
    """A parameter of `leaf` as it acts within the adapters around it."""
    tensor = numbers(leaf, name)
    for layer in around:
        if getattr(layer, "parameter_name", "weight") != name:
            continue
        for adapter in layer.active_adapters:
            if adapter in layer.scaling:
                tensor = _with(tensor, leaf, layer, adapter)
    return tensor


def _with(tensor: Tensor, leaf: Any, layer: Any, adapter: str) -> Tensor:
    """`tensor` with one low-rank adapter: W + s B A, in W's own shape; for DoRA with the lengths it prescribes."""
    tensor = whole(tensor)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    across = adapter in layer.lora_embedding_A  # inputs are rows: an embedding's [V, H], or GPT-2's [in, out]
    if across:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        across = bool(getattr(layer, "fan_in_fan_out", False))
    a, b = (whole(part).to(tensor.dtype) for part in (a, b))
    tensor = tensor + layer.scaling[adapter] * _product(a, b, tensor, across, leaf)
    lengths = getattr(layer, "lora_magnitude_vector", None) or {}
    if adapter in lengths:
        # Each output's weights keep their direction and get a length of their own; the norm counts as a constant.
        norm = torch.linalg.norm(tensor.detach(), dim=0 if across else 1)
        factor = whole(lengths[adapter].weight).to(tensor.dtype) / norm
        tensor = tensor * (factor if across else factor[:, None])
    return tensor


def _product(a: Tensor, b: Tensor, like: Tensor, across: bool, leaf: Any) -> Tensor:
    """B A in the shape of `like`; of fused experts [experts, ...], that of each."""
    if like.ndim == 2:
        return (b @ a).T if across else b @ a
    each_a, each_b = a.view(len(like), -1, a.shape[1]), b.view(len(b), -1, len(like))
    form = "ore,eri->eio" if getattr(leaf, "is_transposed", False) else "ore,eri->eoi"
    return torch.einsum(form, each_b, each_a)


def _is_lora(layer: Any) -> bool:
    """Whether `_with` knows what the adapter does."""
    variants = getattr(layer, "lora_variant", None) or {}
    plain = all(type(v).__name__.startswith("Dora") for v in variants.values())
    return hasattr(layer, "lora_A") and plain and not any(layer.lora_bias.values())


def _merged_copy(module: nn.Module) -> Any:
    """The plain module within adapters of any other kind that peft can merge, in float32."""
    twin: Any = copy.deepcopy(module).float()
    layers = [twin]
    while "base_layer" in layers[-1]._modules:
        layers.append(layers[-1].base_layer)
    for layer in reversed(layers[:-1]):
        layer.merge()
    return layers[-1]
