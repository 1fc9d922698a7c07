"""What a coarser type does to a model's numbers: its weights, rounded, and the arithmetic's own error.

What rounding does to weights can be computed (`held_as`), and must be: it is not noise. Updates that are too small for
the type are lost together, in one direction, and move log-probabilities by several times what arithmetic does.

What arithmetic adds can only be estimated (`rounding`), by Monte Carlo. With a unit round-off `u` it makes of every
result x some x * (1 + d) with |d| <= u. So log-probabilities are computed again with random such d on what every module
gives out, and compared (D. S. Parker, Monte Carlo Arithmetic, 1997). Nothing need be known of the other side's kernels,
in which order they add, or what they fuse: only the type that they compute in. What comes out is how sensitive these
weights are on these tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of a number rounded to `dtype`: 2^-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2


@contextmanager
def rounding(model: nn.Module, size: float, seed: int) -> Iterator[None]:
    """While it lasts, every number that a module of `model` gives out is off by a random factor in 1 +- `size`.

    Args:
        model: only its forward passes change.
        size: a unit round-off (see `unit`).
        seed: of the factors; the same ones on every process.
    """
    streams: dict[torch.device, torch.Generator] = {}

    def off(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.device not in streams:
            streams[value.device] = torch.Generator(value.device).manual_seed(seed)
        factors = torch.empty_like(value, dtype=torch.float32)
        return value * factors.uniform_(1 - size, 1 + size, generator=streams[value.device]).to(value.dtype)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return tuple(map(off, output)) if type(output) is tuple else off(output)

    hooks = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def held_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, `model` computes with its weights rounded to `dtype`, in the type that they have.

    Each layer's are rounded when it begins, and put back when it ends: no more than a layer is there twice. Weights
    that no module's own forward reads (those of a head that is used as a matrix) stay as they are.
    """
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def before(deep: bool, module: nn.Module, inputs: Any) -> None:
        kept[module] = [(p, p.data) for p in module.parameters(deep) if _finer(p.dtype, dtype)]
        for parameter, data in kept[module]:
            parameter.data = data.to(dtype).to(data.dtype)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        for parameter, data in kept.pop(module, []):
            parameter.data = data

    hooks: list[Any] = []
    for module, deep in _units(model):
        hooks.append(module.register_forward_pre_hook(partial(before, deep)))
        hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
        for module in list(kept):  # a forward that failed
            after(module, None, None)


def _finer(one: torch.dtype, other: torch.dtype) -> bool:
    return one.is_floating_point and torch.finfo(one).eps < torch.finfo(other).eps


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Members of lists of layers with all that is in them, and the other modules that have weights of their own."""
    if next(module.parameters(recurse=False), None) is not None:
        yield module, False
    for child in module.children():
        if isinstance(module, nn.ModuleList):
            yield child, True
        else:
            yield from _units(child)
