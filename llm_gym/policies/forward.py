"""One forward of a transformers model over cached rows, and the proof that it gives the model's own logits."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llm_gym.errors import SettingError
from llm_gym.policies.kv_cache import ATTENTION, Layout, SlotCache, attention, windowed
from llm_gym.policies.lean import Lean
from llm_gym.policies.selftest import SelfTest, forget_lengths

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
    window: int | None = None
    """What every layer's attention sees, where the model tells its mask alone; None: all, or as each layer says."""

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Logits [n, vocabulary] after the last column of ids [n, T]; `mask` [n, 1, T, L] is added to the scores."""
        forget_lengths(self.model)
        mask = mask if self.window is None else windowed(mask, self.window)
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
def probe(model: nn.Module, autocast_dtype: torch.dtype | None, length: int | None = None) -> tuple[Served, float]:
    """Learns what the model caches, and up to which length its cached logits are its plain ones.

    That is proven on a small copy (see `selftest`), on both sides of every length at which the model changes; then on
    two short sequences of the model itself. The quick forward is taken where it gives the same up to `length`.

    Args:
        model: its mode and attention implementation are restored.
        autocast_dtype: see `Served`.
        length: the longest context that is wanted; None: any.

    Returns:
        How it is served, and the longest context that is served right (inf: any).

    Raises:
        SettingError: none is, or the model works in a way that the engine does not know.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary_of(model), (2, 6))
    plain, layout = _plain(model, ids, autocast_dtype)
    want = torch.stack([plain[0, 5], plain[1, 2]])
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    wanted = math.inf if length is None else length
    served = Served(model, layout, autocast_dtype)
    lean = Lean.of(model) if autocast_dtype is None else None
    if lean is not None:
        try:
            quick = _proven(replace(served, lean=lean), ids, want)
            if _bound(base, "lean") >= wanted:
                return quick, math.inf
        except SettingError as error:
            log.debug("the quick forward is left out: %s", error)
    window = getattr(base.config.get_text_config(), "sliding_window", None)
    ways = [(None, "modules"), *([(window, "mask")] if isinstance(window, int) else [])]
    bounds = [(_bound(base, way), replace(served, window=window)) for window, way in ways]
    bound, served = max(bounds, key=lambda pair: pair[0])
    served = _proven(served, ids, want)
    if bound < 2:
        raise SettingError(
            f"model: the built-in engine cannot serve {type(base).__name__}: its cached logits are not those of a "
            "plain forward; use a vLLM engine."
        )
    return served, bound


def _plain(model: nn.Module, ids: npt.NDArray[np.int64], autocast_dtype: torch.dtype | None) -> tuple[Tensor, Layout]:
    """Plain logits of two sequences, and what the model caches.

    Raises:
        SettingError: no cache of keys and values, the same for each layer.
    """
    device, name = next(model.parameters()).device, type(model).__name__
    backend = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    capped = getattr(model.config, "attn_logit_softcapping", None)  # which `sdpa` leaves out without a word
    try:
        with attention(model, "eager" if capped else backend), evaluating(model), _autocast(device, autocast_dtype):
            forget_lengths(model)
            plain = model(input_ids=torch.from_numpy(ids).to(device), use_cache=True)
        past = plain.past_key_values
    except Exception as error:
        raise SettingError(
            f"model: the built-in engine cannot serve {name}, which keeps no cache of keys and values "
            f"({_first_line(error)}); use a vLLM engine."
        ) from error
    return plain.logits, _layout(model, past, autocast_dtype, device)


_BOUNDS: dict[tuple[type, str, str], float] = {}


def _bound(model: Any, way: str) -> float:
    """The longest context that is served right in a way, on a small copy; once for each class and config."""
    key = type(model), json.dumps(model.config.to_dict(), sort_keys=True, default=str), way
    if key not in _BOUNDS:
        try:
            test = SelfTest(model)
            _BOUNDS[key] = test.bound(partial(_cached, way=way))
        except Exception as error:
            log.debug("self-test of the engine: %r", error)
            _BOUNDS[key] = 0
    return _BOUNDS[key]


def _cached(model: Any, rows: Sequence[Tensor], way: str) -> list[Tensor]:
    """Logits after each row's last token: its beginning fed in two forwards, then its last two tokens one by one."""
    ids = [row.cpu().numpy() for row in rows]
    layout = _plain(model, np.stack([ids[0][:4], ids[0][:4]]), None)[1]
    served = Served(model, layout, window=model.config.get_text_config().sliding_window if way == "mask" else None)
    lean = Lean.of(model) if way == "lean" else None
    cache = SlotCache(layout)
    cache.resize(len(rows), max(len(row) for row in ids) + 1)
    logits = torch.empty(0)
    starts = np.zeros(len(ids), np.int64)
    for stops in ([(len(row) - 2) // 2 for row in ids], *([len(row) - left for row in ids] for left in (2, 1, 0))):
        new, positions = _left_padded(ids, starts, np.array(stops))
        if lean is not None:
            logits = torch.from_numpy(lean(np.arange(len(ids)), new, positions, cache))
        else:
            logits = feed(served, cache, slice(0, len(ids)), new, positions)
        starts = np.array(stops)
    return list(logits[:, None])


def _left_padded(
    ids: Sequence[npt.NDArray[np.int64]], starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens [start, stop) of each row and their positions, as `feed` wants them."""
    width = int((stops - starts).max())
    positions = np.arange(width) - width + stops[:, None]
    positions[positions < starts[:, None]] = -1
    return np.stack([np.where(p >= 0, row[p], 0) for row, p in zip(ids, positions, strict=True)]), positions


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
        raise SettingError(
            f"model: the built-in engine cannot serve {name} ({_first_line(error)}); use a vLLM engine."
        ) from error
    off = (cached.double() - want.double()).abs().max() / want.double().std().clamp_min(1e-12)
    if not off <= TOLERANCE.get(served.layout.dtype, 0.2):
        raise SettingError(
            f"model: the built-in engine cannot serve {name}: its cached logits are off by "
            f"{off:.2g} standard deviations; use a vLLM engine."
        )
    return served


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


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
        raise SettingError(
            f"model: the built-in engine cannot serve {type(model).__name__}, whose layers do not all cache keys and "
            "values of one shape; use a vLLM engine."
        )
    keys, values = pairs[0]
    return Layout(len(pairs), keys.shape[1], keys.shape[3], values.shape[3], autocast_dtype or keys.dtype, device)
