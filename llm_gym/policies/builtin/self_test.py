"""The self-test of a model: up to which length another way to compute it gives what it gives for each row alone.

The learner packs or pads rows, the engine caches them; both may leave out what a model does to long rows only, or to
large numbers only. So each of their ways is run on a small copy of the model (see `small_copy`), over rows on both
sides of every switch, together; what it must give is a plain forward of each row alone, with eager attention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llm_gym.models.small_copy import is_dynamic, small_copy, switches_of
from llm_gym.policies.builtin.kv_cache import attention

log = logging.getLogger(__name__)

Way = Callable[[Any, Sequence[Tensor]], Iterable[Tensor]]
"""(model, rows of token ids [n] each) -> logits of the last few tokens of each row, [k, V] each, k <= n."""
PLAIN = 24
"""Most tokens of a row where the model itself must stand in for its copy."""
TOLERANCE = 1e-3
"""Most difference of logits, in standard deviations of them; a copy is float32."""


class SelfTest:
    """The small copy of a model, its rows, and their logits.

    Args:
        model: a causal language model of transformers, without peft around it. It stands in for a copy that cannot be
            built, and is left as it was; then every way is taken to hold up to the first switch that was not crossed.

    Raises:
        Exception: whatever the model itself raises on a plain row.
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        found = small_copy(model)
        self.copied = found is not None
        self.model, self.switches = found or (model, {n: n for n in switches_of(model.config.get_text_config())})
        self.unproven = math.inf
        if not self.copied:
            self.unproven = min((n for n in self.switches if n >= PLAIN), default=math.inf)
            log.warning(
                "%s: no small copy of it can be built, so it was tested itself, on at most %d tokens.",
                type(model).__name__,
                PLAIN,
            )
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        few = range(min(9, vocabulary // 2), min(21, vocabulary))  # tokens come twice, so scores can be equal
        random = torch.Generator().manual_seed(0)
        self.device = next(self.model.parameters()).device
        self.rows = [
            torch.randint(few.start, few.stop, (n,), generator=random).to(self.device)
            for n in _row_lengths([n for n in self.switches if self.copied or n < PLAIN])
        ]
        with eager(self.model):
            self.want = [plain(self.model, row) for row in self.rows]
            half = len(self.rows[-1]) // 2
            other = torch.cat([self.rows[-1][:half], self.rows[-1][half:].flip(0)])
            before = plain(self.model, other)[:half]
        self.causal = _close([before], [self.want[-1][:half]], self.tolerance)
        """Whether a token's logits depend on nothing after it."""

    @property
    def tolerance(self) -> float:
        """Of `model`'s logits, in standard deviations."""
        exact = next(self.model.parameters()).dtype in (torch.float32, torch.float64)
        return TOLERANCE if exact else 0.1

    def bound(self, way: Way) -> float:
        """The longest rows that `way` computes right, all together, in tokens of the model; inf: all, 0: none."""
        for limit in (math.inf, *sorted(self.switches, reverse=True)):
            chosen = [i for i, row in enumerate(self.rows) if len(row) <= limit]
            if not chosen:
                break
            try:
                got = list(way(self.model, [self.rows[i] for i in chosen]))
            except Exception as error:
                log.debug("self-test: %r", error)
                continue
            if _close(got, [self.want[i][-len(x) :] for i, x in zip(chosen, got, strict=True)], self.tolerance):
                return self.unproven if limit == math.inf else min(self.switches[int(limit)], self.unproven)
        return 0


def _row_lengths(switches: Sequence[int]) -> list[int]:
    """Lengths on both sides of each switch, at it, and two well beyond the last."""
    ordered = sorted(switches)
    last = ordered[-1] if ordered else 8
    edges = {n + more for n in ordered for more in (-3, 0, 1)}
    return sorted(n for n in {4, 7, *edges, 2 * last, 2 * last + 5} if n >= 4)


def plain(model: Any, row: Tensor) -> Tensor:
    """The logits of a row alone, without a cache, [n, V]."""
    forget_lengths(model)
    logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return logits.float()


def eager(model: Any) -> Any:
    """A context in which `model` computes attention as it was written, without kernels."""
    return attention(model, "eager") if getattr(model.config, "_attn_implementation", None) else nullcontext()


def forget_lengths(model: Any) -> None:
    """Makes rotary embeddings that depend on the longest row seen depend on the next forward's alone.

    Those of dynamic NTK keep the angles of the longest row until a very short one comes: without this, logits would
    depend on what was computed before. The angles go back to those that the model was made with, which are not always
    what their formula gives for a short row (HunYuan's `alpha`).
    """
    if not is_dynamic(model.config.get_text_config()):
        return
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            getattr(module, f"{kind}inv_freq").copy_(getattr(module, f"{kind}original_inv_freq"))
            setattr(module, name, module.original_max_seq_len)


def _close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> bool:
    """Equal up to `tolerance` standard deviations of what is wanted; NaN is not."""
    a, b = torch.cat([x.double() for x in got]), torch.cat([x.double() for x in want])
    return bool((a - b).abs().max() <= tolerance * b.std().clamp_min(1e-12))
