"""A cheaper gated MLP for transformers models on a CPU, on the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from llm_gym.harness.model.operations import operations

OPERATIONS = ["mm", "mm", "mm", "mul", "silu"]
"""What such an MLP consists of."""
CHUNK = 512
"""Tokens whose intermediate results are made, and used up, at a time: they stay in the CPU's cache."""


def fuse_mlps(model: nn.Module) -> int:
    """Gives gated MLPs (https://arxiv.org/abs/2002.05202, SwiGLU) their own backward; returns how many were changed.

    A layer is changed only if its operations are those of `down(silu(gate(x)) * up(x))`, which a clamp of the
    intermediate results is not, and its results too. Of the five intermediate results that autograd would keep for
    the backward, three are kept; the others are made again.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.__class__ = _fused(type(layer))
    return len(layers)


def _projections(module: Any) -> list[Any]:
    return [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]


def _is_product(layer: Any) -> bool:
    """Whether a layer is a matrix product and nothing else: no bias, no adapter, nobody looking."""
    hooks = getattr(layer, "_forward_hooks", None) or getattr(layer, "_forward_pre_hooks", None)
    return type(layer) is nn.Linear and getattr(layer, "bias", None) is None and not hooks


def _is_plain(module: nn.Module) -> bool:
    layers = _projections(module)
    if not all(map(_is_product, layers)) or layers[0].weight.device.type == "meta":
        return False
    gate, up, down = layers
    x = torch.linspace(-3, 3, gate.in_features, device=gate.weight.device, dtype=gate.weight.dtype)[None]
    x = torch.cat([x, 30 * x])
    try:
        y, names = operations(module, x)
        with torch.no_grad():
            return sorted(names) == OPERATIONS and torch.equal(y, down(silu(gate(x)) * up(x)))
    except (TypeError, RuntimeError):  # a layer with the same names that wants, or gives, something else
        return False


_FUSED: dict[type, type] = {}


def _fused(cls: type) -> type:
    """A subclass of a transformers MLP that computes the same, its backward written out."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = _projections(self)
        exact = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        usable = exact and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if not (usable and all(map(_is_product, layers))):
            result: Tensor = cls.forward(self, x)  # type: ignore[attr-defined]
            return result
        flat: Tensor = _GatedMLP.apply(x.flatten(0, -2), *(layer.weight for layer in layers))  # type: ignore[no-untyped-call]
        return flat.view(*x.shape[:-1], -1)

    if cls not in _FUSED:
        _FUSED[cls] = type(f"Fused{cls.__name__}", (cls,), {"forward": forward})
    return _FUSED[cls]


class _GatedMLP(torch.autograd.Function):
    """y = (silu(x G') * (x U')) D', in chunks of tokens; silu(a) = a * sigmoid(a)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a, b = (x.new_empty(len(x), len(gate)) for _ in range(2))
        y = x.new_empty(len(x), len(down))
        for rows in _chunks(len(x)):
            torch.mm(x[rows], gate.t(), out=a[rows])
            torch.mm(x[rows], up.t(), out=b[rows])
            torch.mm(silu(a[rows]).mul_(b[rows]), down.t(), out=y[rows])
        ctx.save_for_backward(x, a, b, gate, up, down)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, gate, up, down = ctx.saved_tensors
        d_x, d_gate, d_up, d_down = (
            torch.zeros_like(of) if needed else None
            for of, needed in zip((x, gate, up, down), ctx.needs_input_grad, strict=True)
        )
        for rows in _chunks(len(x)):
            inner = torch.mm(grad[rows], down)
            active = silu(a[rows])
            if d_down is not None:
                d_down.addmm_(grad[rows].t(), active * b[rows])
            d_b = active.mul_(inner)
            d_a = torch.ops.aten.silu_backward(inner.mul_(b[rows]), a[rows])
            if d_gate is not None:
                d_gate.addmm_(d_a.t(), x[rows])
            if d_up is not None:
                d_up.addmm_(d_b.t(), x[rows])
            if d_x is not None:
                d_x[rows].addmm_(d_a, gate).addmm_(d_b, up)
        return d_x, d_gate, d_up, d_down


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
