"""How the built-in engine serves a model: what it may cache, up to which length, proven against plain forwards."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llm_gym.errors import SettingError
from llm_gym.models.loading import limit_of
from llm_gym.policies.builtin.forward import Served, autocast, evaluating, feed, vocabulary_of
from llm_gym.policies.builtin.kv_cache import Layout, SlotCache, attention
from llm_gym.policies.builtin.numpy_forward import Lean
from llm_gym.policies.builtin.self_test import SelfTest, eager, forget_lengths, plain
from llm_gym.policies.builtin.uncached import Uncached

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Most difference between the engine's and plain logits, in standard deviations of them; 0.2 in half precision."""


class NoCache(Exception):
    """Why what the engine knows how to cache is not enough for a model: the end of a sentence."""


@torch.no_grad()
def settle(model: nn.Module, autocast_dtype: torch.dtype | None, wanted: int | None) -> tuple[Served, int]:
    """How a model is served, and the longest context.

    Keys and values are cached as far as that gives the logits of a plain forward. Where it does not (at all, or up to
    the context that is wanted), every token computes its whole row again, which a warning says.

    Args:
        model: its mode and attention implementation are restored.
        autocast_dtype: see `Served`.
        wanted: the longest context, tokens; None: the model's own limit, or less where caching ends earlier.

    Raises:
        SettingError: `wanted` exceeds the model's limit, or even whole rows are not computed right.
    """
    length = limit_of(model, wanted)
    try:
        served, bound = probe(model, autocast_dtype, length)
        reason = f"beyond {bound:g} tokens its windows or rotary embedding are others than those of cached keys"
    except NoCache as error:
        served, bound, reason = None, 0, str(error)
    if bound < length and (served is None or wanted is not None):
        whole, further = _whole(model, autocast_dtype, reason)
        if further > bound:
            log.warning(
                "the built-in engine caches nothing of %s (%s): every token computes its whole row again, which is "
                "slow; a vLLM engine is quicker where it knows the model.",
                type(_base(model)).__name__,
                reason,
            )
            served, bound = whole, further
    assert served is not None
    if bound < length:
        if wanted is not None:
            raise SettingError(
                f"max_context: got {wanted}, but beyond {bound:g} tokens this model does what the built-in engine does "
                f"not (a sliding window, or a rotary embedding that is stretched); pass at most {bound:g}, or use a "
                "vLLM engine."
            )
        log.warning("the built-in engine serves contexts of up to %d tokens of this model, not %d.", bound, length)
    return served, int(min(bound, length))


@torch.no_grad()
def probe(model: nn.Module, autocast_dtype: torch.dtype | None, length: int | None = None) -> tuple[Served, float]:
    """Learns what the model caches, and up to which length its cached logits are its plain ones.

    That is proven on a small copy (see `self_test`), on both sides of every length at which the model changes; then on
    two short sequences of the model itself. The quick forward is taken where it gives the same up to `length`.

    Args:
        model, autocast_dtype: as in `settle`.
        length: the longest context that is wanted; None: any.

    Returns:
        How it is served, and the longest context that is served right (inf: any).

    Raises:
        NoCache: none is.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary_of(model), (2, 6))
    logits, layout = _examined(model, ids, autocast_dtype)
    want = torch.stack([logits[0, 5], logits[1, 2]])
    base = _base(model)
    wanted = math.inf if length is None else length
    served = Served(model, layout, autocast_dtype)
    lean = Lean.of(model) if autocast_dtype is None else None
    if lean is not None:
        try:
            quick = _proven(replace(served, lean=lean), ids, want)
            if _bound(base, "lean", partial(_cached, way="lean")) >= wanted:
                return quick, math.inf
        except NoCache as error:
            log.debug("the quick forward is left out: %s", error)
    window = getattr(base.config.get_text_config(), "sliding_window", None)
    ways = [(None, "modules"), *([(window, "mask")] if isinstance(window, int) else [])]
    bounds = [(_bound(base, way, partial(_cached, way=way)), replace(served, window=window)) for window, way in ways]
    bound, served = max(bounds, key=lambda pair: pair[0])
    served = _proven(served, ids, want)
    if bound < 2:
        raise NoCache("its cached logits are not those of a plain forward")
    return served, bound


def _whole(model: Any, autocast_dtype: torch.dtype | None, reason: str) -> tuple[Served, float]:
    """The model served without a cache: rows together if they may be, with the quicker attention if that is right."""
    base, parameter = _base(model), next(model.parameters())
    name = f"model: the built-in engine cannot serve {type(base).__name__}"
    layout = Layout(0, 0, 0, 0, autocast_dtype or parameter.dtype, parameter.device)
    ids = np.random.default_rng(0).integers(0, vocabulary_of(model), (2, 6))
    rows = [ids[0], ids[1, :3]]
    try:
        with evaluating(model), autocast(parameter.device, autocast_dtype), eager(model):
            want = torch.stack([plain(model, torch.from_numpy(row).to(parameter.device))[-1] for row in rows])
    except Exception as error:
        raise SettingError(f"{name}: a plain forward of a row fails ({_first_line(error)}).") from error
    best: tuple[float, Served | None] = 0, None
    for together, backend in itertools.product((True, False), ("sdpa", "eager")):
        bound = _bound(base, f"{together}, {backend}", partial(_computed, together=together, backend=backend))
        if bound > best[0]:
            served = Served(model, layout, autocast_dtype, uncached=Uncached(model, together, backend))
            if _off(served.whole(rows, 1 << 20), want) <= TOLERANCE.get(layout.dtype, 0.2):
                best = bound, served
    if best[1] is None or best[0] < 2:
        raise SettingError(
            f"{name}: {reason}, and computing whole rows gives other logits than a row alone; use a vLLM engine."
        )
    return best[1], best[0]


def _computed(model: Any, rows: Sequence[Tensor], together: bool, backend: str) -> list[Tensor]:
    """Logits after the last three tokens of each row, computed without a cache, each when the row ends there."""
    ids = [row[: len(row) - left].cpu().numpy() for row in rows for left in (2, 1, 0)]
    return list(Uncached(model, together, backend)(ids, 1 << 20).float().view(len(rows), 3, -1))


def _base(model: Any) -> Any:
    """The model without peft around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _examined(
    model: nn.Module, ids: npt.NDArray[np.int64], autocast_dtype: torch.dtype | None
) -> tuple[Tensor, Layout]:
    """Plain logits of two sequences, and what the model caches.

    Raises:
        NoCache: no cache of keys and values, the same for each layer.
    """
    device = next(model.parameters()).device
    backend = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    capped = getattr(model.config, "attn_logit_softcapping", None)  # which `sdpa` leaves out without a word
    try:
        with attention(model, "eager" if capped else backend), evaluating(model), autocast(device, autocast_dtype):
            forget_lengths(model)
            output = model(input_ids=torch.from_numpy(ids).to(device), use_cache=True)
        past = output.past_key_values
    except Exception as error:
        raise NoCache(f"a forward that caches fails, {_first_line(error)!r}") from error
    return output.logits, _layout(model, past, autocast_dtype, device)


BOUNDS: dict[tuple[type, str, str], float] = {}


def _bound(model: Any, name: str, way: Callable[[Any, Sequence[Tensor]], list[Tensor]]) -> float:
    """The longest context that is served right in a way, on a small copy; once for each class, config and name."""
    key = type(model), json.dumps(model.config.to_dict(), sort_keys=True, default=str), name
    if key not in BOUNDS:
        try:
            with evaluating(model):  # it may stand in for its copy
                BOUNDS[key] = SelfTest(model).bound(way)
        except Exception as error:
            log.debug("self-test of the engine: %r", error)
            BOUNDS[key] = 0
    return BOUNDS[key]


def _cached(model: Any, rows: Sequence[Tensor], way: str) -> list[Tensor]:
    """Logits after each row's last token: its beginning fed in two forwards, then its last two tokens one by one."""
    ids = [row.cpu().numpy() for row in rows]
    layout = _examined(model, np.stack([ids[0][:4], ids[0][:4]]), None)[1]
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
    cache = SlotCache(served.layout)
    cache.resize(2, 8)
    both = slice(0, 2)
    try:  # 4 + 1 + 1 tokens of the first sequence; 1 + 1 + 1 of the second, padded: prefill and decoding steps
        feed(served, cache, both, np.stack([ids[0, :4], np.roll(ids[1], 3)[:4]]), _FIRST)
        feed(served, cache, both, np.stack([ids[0, 4:5], ids[1, 1:2]]), _SECOND)
        cached = feed(served, cache, both, np.stack([ids[0, 5:], ids[1, 2:3]]), _SECOND + 1)
    except Exception as error:
        raise NoCache(f"a forward with cached keys fails, {_first_line(error)!r}") from error
    off = _off(cached, want)
    if not off <= TOLERANCE.get(served.layout.dtype, 0.2):
        raise NoCache(f"its cached logits are off by {off:.2g} standard deviations")
    return served


def _off(got: Tensor, want: Tensor) -> float:
    """The largest difference of logits, in standard deviations of them; NaN where they are not finite."""
    return float((got.double() - want.double()).abs().max() / want.double().std().clamp_min(1e-12))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


_FIRST = np.array([[0, 1, 2, 3], [-1, -1, -1, 0]])
_SECOND = np.array([[4], [1]])


def _layout(model: nn.Module, past: Any, autocast_dtype: torch.dtype | None, device: torch.device) -> Layout:
    pairs: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(past, "layers", ())
    ]
    shapes = {(tuple(k.shape), tuple(v.shape)) if k is not None and v is not None else None for k, v in pairs}
    if len(shapes) != 1 or None in shapes:
        raise NoCache("its layers do not all cache keys and values of one shape")
    keys, values = pairs[0]
    return Layout(len(pairs), keys.shape[1], keys.shape[3], values.shape[3], autocast_dtype or keys.dtype, device)
