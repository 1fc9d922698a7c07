"""One forward of a transformers model over cached rows, and the proof that it gives the model's own logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llm_gym.errors import SettingError
from llm_gym.policies.kv_cache import ATTENTION, Layout, SlotCache, attention
from llm_gym.policies.lean import Lean

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Most difference between cached and plain logits, in standard deviations of the logits; 0.2 in half precision."""


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

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Logits [n, vocabulary] after the last column of ids [n, T]; `mask` [n, 1, T, L] is added to the scores."""
        with attention(self.model, ATTENTION), _autocast(ids.device, self.autocast_dtype):
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


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
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


@torch.no_grad()
def probe(model: nn.Module, autocast_dtype: torch.dtype | None) -> Served:
    """Learns what the model caches, and proves on two short sequences that its cached logits are its plain ones.

    The quick forward is taken where it gives them too.

    Raises:
        SettingError: they are not, or the model works in a way that the engine does not know.
    """
    device = next(model.parameters()).device
    ids = np.random.default_rng(0).integers(0, vocabulary_of(model), (2, 6))
    backend = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    with attention(model, backend), evaluating(model), _autocast(device, autocast_dtype):
        plain = model(input_ids=torch.from_numpy(ids).to(device), use_cache=True)
    want = torch.stack([plain.logits[0, 5], plain.logits[1, 2]])
    served = Served(model, _layout(model, plain.past_key_values, autocast_dtype, device), autocast_dtype)
    lean = Lean.of(model) if autocast_dtype is None else None
    if lean is not None:
        try:
            return _proven(replace(served, lean=lean), ids, want)
        except SettingError as error:
            log.debug("the quick forward is left out: %s", error)
    return _proven(served, ids, want)


def _proven(served: Served, ids: npt.NDArray[np.int64], want: Tensor) -> Served:
    """`served`, if its cached logits are `want`."""
    name = type(served.model).__name__
    cache = SlotCache(served.layout)
    cache.resize(2, 8)
    both = slice(0, 2)
    try:  # 4 + 1 + 1 tokens of the first sequence; 1 + 1 + 1 of the second, padded: prefill and decoding steps
        feed(served, cache, both, np.stack([ids[0, :4], np.roll(ids[1], 3)[:4]]), _FIRST)
        feed(served, cache, both, np.stack([ids[0, 4:5], ids[1, 1:2]]), _SECOND)
        cached = feed(served, cache, both, np.stack([ids[0, 5:], ids[1, 2:3]]), _SECOND + 1)
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(f"model: the built-in engine cannot serve {name}: {error}") from error
    off = (cached.double() - want.double()).abs().max() / want.double().std().clamp_min(1e-12)
    if not off <= TOLERANCE.get(served.layout.dtype, 0.2):
        raise SettingError(
            f"model: the built-in engine cannot serve {name}: its cached logits are off by "
            f"{off:.2g} standard deviations."
        )
    return served


_FIRST = np.array([[0, 1, 2, 3], [-1, -1, -1, 0]])
_SECOND = np.array([[4], [1]])


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the embedding: one more than the largest id that can be fed."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _layout(model: nn.Module, past: Any, autocast_dtype: torch.dtype | None, device: torch.device) -> Layout:
    pairs: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(past, "layers", ())
    ]
    shapes = {(tuple(k.shape), tuple(v.shape)) if k is not None and v is not None else None for k, v in pairs}
    if len(shapes) != 1 or None in shapes:
        raise SettingError(f"model: the built-in engine cannot serve {type(model).__name__}: its cache is not uniform.")
    keys, values = pairs[0]
    return Layout(len(pairs), keys.shape[1], keys.shape[3], values.shape[3], autocast_dtype or keys.dtype, device)
