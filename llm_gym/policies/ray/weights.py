"""Weights in Ray's object store, in pieces: engines fetch them from there, those on one machine together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import ray
import torch
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from llm_gym.errors import PolicyError

PIECE = 256 << 20
"""Bytes after which a piece is full; a larger tensor is a piece of its own."""

Tensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]
Pieces: TypeAlias = tuple[Any, ...]
"""References to lists of (name, type, shape, bytes); the object store keeps what one of them is held to."""


@dataclass(frozen=True)
class Weights:
    """What every engine must serve."""

    update: int
    """Counts on with every update."""
    version: int
    base: int = 0
    """The update that brought the weights beneath the adapter; 0: those that the engine was made with."""
    pieces: Pieces = ()
    """The weights of that update."""
    adapter: tuple[Pieces, Mapping[str, Any]] | None = None
    """Of an adapter: its tensors, and what PEFT writes to `adapter_config.json`."""


def stored(tensors: Tensors) -> Pieces:
    """Puts tensors into the object store.

    Raises:
        PolicyError: it is full, and so is the disk behind it.
    """
    pieces: list[Any] = []
    piece: list[tuple[str, str, list[int], Any]] = []
    room = PIECE
    for name, tensor in tensors:
        held = tensor.detach().cpu().contiguous()
        if piece and held.nbytes > room:
            pieces.append(_put(piece))
            piece, room = [], PIECE
        room -= held.nbytes
        kind = str(held.dtype).removeprefix("torch.")
        piece.append((name, kind, list(held.shape), held.flatten().view(torch.uint8).numpy()))
    return (*pieces, _put(piece)) if piece else tuple(pieces)


def fetched(pieces: Pieces) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors again, on the CPU, one piece in memory at a time."""
    for reference in pieces:
        for name, kind, shape, raw in ray.get(reference):
            held = torch.from_numpy(np.array(raw))  # the store's own memory is read-only
            yield name, held.view(getattr(torch, kind)).reshape(shape)


def _put(piece: list[tuple[str, str, list[int], Any]]) -> Any:
    try:
        return ray.put(piece)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        size = sum(len(raw) for *_, raw in piece) >> 20
        raise PolicyError(
            f"cluster: {size} MiB of weights found no room in Ray's object store nor on the disk behind it; give it "
            "more (`ray start --object-store-memory`, a larger temporary folder)."
        ) from error
