"""One forward of a transformers model over rows that are cached, or computed anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llm_gym.policies.builtin.kv_cache import ATTENTION, Layout, SlotCache, attention, windowed
from llm_gym.policies.builtin.numpy_forward import Lean
from llm_gym.policies.builtin.self_test import forget_lengths
from llm_gym.policies.builtin.uncached import Uncached


@dataclass(frozen=True, slots=True)
class Served:
    """A model, and how the engine runs it."""

    model: nn.Module
    layout: Layout
    """What it caches."""
    autocast_dtype: torch.dtype | None = None
    """It computes in this dtype; None: in the parameters'."""
    lean: Lean | None = None
    """The quick forward; None: the model's own."""
    window: int | None = None
    """What every layer's attention sees, where the model tells its mask alone; None: all, or as each layer says."""
    uncached: Uncached | None = None
    """The forward over whole rows of a model that cannot be cached; None: it is."""

    @torch.no_grad()
    def whole(self, rows: Sequence[npt.NDArray[np.integer]], most: int) -> Tensor:
        """Logits [n, vocabulary] after the last tokens of rows of token ids, without a cache; see `Uncached`."""
        assert self.uncached is not None
        with evaluating(self.model), autocast(self.layout.device, self.autocast_dtype):
            logits = self.uncached(rows, most)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Logits [n, vocabulary] after the last column of ids [n, T]; `mask` [n, 1, T, L] is added to the scores."""
        forget_lengths(self.model)
        mask = mask if self.window is None else windowed(mask, self.window)
        with attention(self.model, ATTENTION), autocast(ids.device, self.autocast_dtype):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        return logits


@torch.no_grad()
def feed(
    served: Served,
    cache: SlotCache,
    rows: slice | npt.NDArray[np.integer],
    ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> Tensor:
    """Feeds T new tokens of n rows, each attending to its row's tokens up to itself.

    Args:
        served: the model; its mode and attention implementation are restored.
        cache: takes the new keys and values.
        rows: the n rows.
        ids: int64 [n, T], padded on the left.
        positions: int64 [n, T], the position of each token in its row; -1 for padding.

    Returns:
        The logits after the last column, float32 or float64 [n, vocabulary].
    """
    device, dtype = cache.layout.device, cache.layout.dtype
    if served.lean is not None and served.lean.usable:
        index = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return torch.from_numpy(served.lean(index, ids, positions, cache))
    cache.aim(rows, positions)
    seen = torch.from_numpy(np.maximum(positions, 0)).to(device)  # padding sees the first token, and nobody sees it
    hidden = torch.arange(int(positions.max()) + 1, device=device) > seen[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    with evaluating(served.model):
        logits = served.forward(torch.from_numpy(ids).to(device), seen, mask, cache)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context that computes in `dtype` by `torch.autocast`; None: one that changes nothing."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


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


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the embedding: one more than the largest id that can be fed."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
