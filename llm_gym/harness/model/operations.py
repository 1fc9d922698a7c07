"""The operations that a module computes, by name: what proves its form, where numbers prove only some values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = {"t", "view", "_unsafe_view", "reshape", "transpose", "unsqueeze", "squeeze", "expand", "detach", "alias"}
"""Operations that change no number."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(module: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """`module(x)`, and the names of its torch operations in order, without those of shapes alone.

    A clamp, a cap or a branch on a value shows here, however small the numbers of `x` are.
    """
    with _Recorder() as recorder:
        y: Tensor = module(x)
    return y, [name for name in recorder.names if name not in SHAPES]
