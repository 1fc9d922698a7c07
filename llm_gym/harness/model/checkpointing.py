"""What is kept between forward and backward: recomputed instead, or held in CPU memory.

Transformers' own checkpointing does nothing in evaluation mode, and the learner's model is always in it (no
dropout, ever). So the layers' class is replaced, as for the norms: copies of the model then have it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

LEAST = 1 << 16
"""Bytes below which a tensor stays where it is: moving it would cost more than it frees."""


@dataclass(frozen=True, slots=True)
class Keep:
    """How one layer treats what its backward needs."""

    recompute: bool
    """Keep the layer's input only, and run the layer again in backward (https://arxiv.org/abs/1604.06174)."""
    away: Callable[[Tensor], Tensor] | None
    """Where tensors wait for backward; None: where they are."""


def wrap_layers(layers: Iterable[Any], *, checkpointing: int, offload: bool) -> None:
    """Makes decoder layers keep less for backward; the gradient is the same, to the bit.

    Args:
        layers: of the model, changed in place.
        checkpointing: every so many layers one is computed again in backward; 0: none, 1: all.
        offload: what is kept waits in pinned CPU memory (the model must be on another device).
    """
    away = to_host if offload else None
    for number, layer in enumerate(layers, 1):
        recompute = bool(checkpointing) and number % checkpointing == 0
        if recompute or away is not None:
            layer.keep = Keep(recompute, away)
            layer.__class__ = _thin(type(layer))


def to_host(tensor: Tensor) -> Tensor:
    """A copy in CPU memory, pinned, so that the way back overlaps with computation."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return copy.copy_(tensor)


def elsewhere(module: nn.Module, away: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    """While it lasts, what is saved for backward waits as `away(tensor)`; the module's own weights stay."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if tensor.nbytes < LEAST or tensor.untyped_storage().data_ptr() in weights:
            return None, tensor
        return tensor.device, away(tensor)

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


_THIN: dict[type, type] = {}


def _thin(cls: type) -> type:
    """A subclass of a decoder layer that keeps what its `keep` says."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        keep: Keep = self.keep

        def run(*args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        if not torch.is_grad_enabled():  # the built-in engine runs the same module
            return run(*args, **kwargs)
        with elsewhere(self, keep.away) if keep.away else nullcontext():
            if not keep.recompute:
                return run(*args, **kwargs)
            # Not reentrant: the other kind gives no gradient at all where a layer's input needs none (a frozen
            # embedding under adapters). Nothing in a layer is random, so no generator's state is kept.
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    if cls not in _THIN:
        _THIN[cls] = type(f"Thin{cls.__name__}", (cls,), {"forward": forward})
    return _THIN[cls]
