"""Drawing tokens: every row with its own temperature, filters and random stream, all rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
_GOLDEN, _MIX1, _MIX2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.integer]) -> Floats:
    """One number in [0, 1) for token `indices[i]` of the stream `seeds[i]`; no state, so no order of draws.

    SplitMix64 in counter form (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195):
    the seed is mixed first, so that neighbouring seeds give unrelated streams. 52 bits are kept, which
    leaves `u * total < total` in float64 for every total.

    Args:
        seeds: uint64 [n].
        indices: integers [n], the number of tokens drawn before.

    Returns:
        float64 [n].
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Knobs:
    """Per-row sampling settings, each an array [n]; the meaning of each is `core.Sampling`'s."""

    temperature: Floats
    top_k: npt.NDArray[np.integer]
    top_p: Floats
    min_p: Floats


def draw(logits: torch.Tensor, knobs: Knobs, uniform: Floats) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, by inverting the cumulative distribution at `uniform`.

    The filters act in the order top-k, top-p (on what top-k kept), min-p, after the temperature. A row with
    temperature 0 takes the likeliest token, and reports its log-probability at temperature 1.

    Args:
        logits: float32 or float64 [n, vocabulary].
        knobs: settings of the n rows.
        uniform: float64 [n] in [0, 1).

    Returns:
        tokens int64 [n], and log-probabilities [n] (nats, the dtype of `logits`) under the distribution
        drawn from: renormalised on what the filters kept.
    """
    greedy = knobs.temperature == 0
    if (knobs.temperature != 1).any():
        logits = logits / _column(np.where(greedy, 1.0, knobs.temperature), logits)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    filtered = ~greedy & ((knobs.top_k > 0) | (knobs.top_p < 1) | (knobs.min_p > 0))
    if filtered.any():
        rows = torch.from_numpy(np.flatnonzero(filtered)).to(logits.device)
        weights[rows] = keep_likely(weights[rows], knobs, filtered)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, total * _column(uniform, total), right=True)
    tokens.clamp_(max=logits.shape[-1] - 1)  # only ever needed for NaN, which the log-probability then shows
    if greedy.any():
        tokens = torch.where(_column(greedy, None, logits.device), logits.argmax(-1, keepdim=True), tokens)
    logprobs = (logits - top).gather(-1, tokens) - total.log()
    return tokens[:, 0], logprobs[:, 0].to(logits.dtype)


def keep_likely(weights: torch.Tensor, knobs: Knobs, rows: npt.NDArray[np.bool_]) -> torch.Tensor:
    """`weights` [m, vocabulary] with those of the tokens outside the support set to 0; the likeliest always stays."""
    ordered, order = weights.sort(stable=True, dim=-1, descending=True)
    vocabulary = weights.shape[-1]
    top_k = np.where(knobs.top_k[rows] > 0, knobs.top_k[rows], vocabulary)
    rank = torch.arange(vocabulary, device=weights.device)
    ordered = ordered * (rank < _column(top_k, None, weights.device))
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    top_p = _column(knobs.top_p[rows], before)
    keep = (before < top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)) | (top_p >= 1) | (rank == 0)
    keep &= ordered >= _column(knobs.min_p[rows], ordered)  # the likeliest token's weight is exp(0) = 1
    return torch.zeros_like(weights).scatter_(-1, order, ordered * keep)


def _column(
    values: npt.NDArray[np.generic], like: torch.Tensor | None, device: torch.device | None = None
) -> torch.Tensor:
    """`values` [n] as a tensor [n, 1], on the device and in the dtype of `like` where given."""
    column = torch.from_numpy(np.ascontiguousarray(values))[:, None]
    return column.to(like) if like is not None else column.to(device)
