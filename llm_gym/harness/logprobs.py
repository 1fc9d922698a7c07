"""Log-probabilities and entropies of given tokens, without the full [tokens x vocabulary] logits.

The product of hidden states and head weights is made in tiles of `TOKENS` x `VOCABULARY` in two
reused buffers. Forward keeps a running log-sum-exp (online softmax, https://arxiv.org/abs/1805.02867);
backward makes each tile again from it (as FlashAttention does, https://arxiv.org/abs/2205.14135).
Memory is O(tokens + vocabulary) instead of O(tokens * vocabulary); the work is 4 matrix products instead of 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOKENS = 512
"""Rows of a tile."""
VOCABULARY = 2048
"""Columns of a tile; 512 x 2048 float32 is 4 MB, small beside a model and large enough for full speed."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-softmax of `(hidden @ weight.T + bias) / temperature` at `targets`, and the entropy.

    Products and sums are float32 whatever the inputs (float64 for float64 inputs), also under autocast;
    half-precision products on CUDA run on half-precision inputs with float32 results.

    Args:
        hidden: [M, H], differentiable.
        weight: [V, H], differentiable or frozen.
        targets: [M] int64, in [0, V).
        bias: [V] or None, differentiable or frozen.
        temperature: divides the logits; > 0.
        entropy: whether to compute the entropy (differentiable); zeros otherwise, at a lower price.

    Returns:
        (logprobs [M], entropy [M]) in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an id outside the vocabulary, or a temperature that is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logprobs: want hidden [M, H], weight [V, H], targets [M], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"token_logprobs: temperature: got {temperature!r}, want a value > 0.")
    if len(targets) and not (targets.min() >= 0 and targets.max() < len(weight)):
        worst = int(targets.max() if targets.min() >= 0 else targets.min())
        raise ValueError(f"token_logprobs: targets: got {worst}, want ids in [0, {len(weight)}).")
    logprobs, entropies = _Head.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, float(temperature), entropy
    )
    return logprobs, entropies


class _Tiles:
    """Tiles of the scaled logits, [rows, columns] at a time, in one reused buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        self.hidden, self.weight, self.bias, self.temperature = hidden, weight, bias, temperature
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.half = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        self.work = hidden.dtype if self.half else self.exact
        self.rows, self.columns = min(TOKENS, len(hidden)), min(VOCABULARY, len(weight))
        self.buffer = self.empty()

    def empty(self) -> Tensor:
        return torch.empty(self.rows * self.columns, dtype=self.exact, device=self.hidden.device)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Vocabulary blocks: (columns, their weights in the working precision)."""
        for start in range(0, len(self.weight), self.columns):
            columns = slice(start, min(start + self.columns, len(self.weight)))
            yield columns, self.weight[columns].to(self.work)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Token chunks: (rows, their hidden states in the working precision)."""
        for start in range(0, len(self.hidden), self.rows):
            rows = slice(start, min(start + self.rows, len(self.hidden)))
            yield rows, self.hidden[rows].to(self.work)

    def logits(self, hidden: Tensor, block: Tensor, columns: slice) -> Tensor:
        """(hidden @ block.T + bias) / temperature, [rows, columns]; overwrites the buffer."""
        out = self.view(self.buffer, len(hidden), len(block))
        self.product(hidden, block.t(), out)
        if self.bias is not None:
            out.add_(self.bias[columns])
        return out if self.temperature == 1.0 else out.div_(self.temperature)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a @ b, accumulated in `exact`."""
        if self.half:
            out.copy_(torch.mm(a, b, out_dtype=torch.float32))
        else:
            torch.mm(a, b, out=out)

    def accumulate(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out += a @ b, accumulated in `exact`."""
        if self.half:
            out.add_(torch.mm(a.to(self.work), b, out_dtype=torch.float32))
        else:
            out.addmm_(a, b)

    @staticmethod
    def view(buffer: Tensor, rows: int, columns: int) -> Tensor:
        return buffer[: rows * columns].view(rows, columns)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            log_z, logprobs, entropies = _statistics(_Tiles(hidden, weight, bias, temperature), targets, entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropies = ctx.saved_tensors
        grad = torch.zeros_like(log_z) if grad is None else grad
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, ctx.temperature)
            grads = _gradients(tiles, targets, log_z, entropies, grad, entropy_grad, ctx.needs_input_grad[:3])
        return *grads, None, None, None


def _statistics(tiles: _Tiles, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One sweep: log-normaliser, log-probability of the target and entropy, each [M]."""
    count, device, exact = len(targets), targets.device, tiles.exact
    peak = torch.full((count,), -torch.inf, dtype=exact, device=device)
    total = torch.zeros(count, dtype=exact, device=device)  # sum of exp(x - peak)
    moment = torch.zeros(count, dtype=exact, device=device)  # sum of (x - peak) * exp(x - peak)
    chosen = torch.zeros(count, dtype=exact, device=device)
    spare = tiles.empty() if entropy else tiles.buffer
    chunks = list(tiles.chunks()) if tiles.work == tiles.hidden.dtype else None
    for columns, block in tiles.blocks():
        for rows, hidden in chunks or tiles.chunks():
            x = tiles.logits(hidden, block, columns)
            at, here = _local(targets[rows], columns)
            chosen[rows] = torch.where(here, x.gather(1, at[:, None])[:, 0], chosen[rows])
            top = torch.maximum(peak[rows], x.amax(1))
            fade = torch.exp(peak[rows] - top)
            weights = torch.exp(x.sub_(top[:, None]), out=tiles.view(spare, *x.shape))
            if entropy:
                shift = torch.where(total[rows] > 0, peak[rows] - top, 0.0)  # peak starts at -inf
                dots = torch.bmm(weights[:, None], x[:, :, None])[:, 0, 0]
                moment[rows] = fade * (moment[rows] + shift * total[rows]) + dots
            total[rows] = fade * total[rows] + weights.sum(1)
            peak[rows] = top
    log_total = total.log()
    entropies = log_total - moment / total if entropy else torch.zeros_like(total)
    return peak + log_total, (chosen - peak) - log_total, entropies


def _gradients(
    tiles: _Tiles,
    targets: Tensor,
    log_z: Tensor,
    entropies: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; p = softmax, l = log p, H = entropy:

    d logprob / d x_j = [j = target] - p_j, and d H / d x_j = -p_j (l_j + H).
    """
    hidden, weight, bias, exact = tiles.hidden, tiles.weight, tiles.bias, tiles.exact
    d_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
    spare = tiles.buffer if entropy_grad is None else tiles.empty()
    chunks = list(tiles.chunks()) if tiles.work == hidden.dtype else None
    for columns, block in tiles.blocks():
        into = None if d_weight is None else torch.zeros(block.shape, dtype=exact, device=block.device)
        into_bias = None if d_bias is None else torch.zeros(len(block), dtype=exact, device=block.device)
        for rows, h in chunks or tiles.chunks():
            logp = tiles.logits(h, block, columns).sub_(log_z[rows, None])
            g = torch.exp(logp, out=tiles.view(spare, *logp.shape))
            if entropy_grad is None:
                g.mul_(-grad[rows, None])
            else:
                e = entropy_grad[rows]
                g.mul_(logp.mul_(-e[:, None]).sub_((grad[rows] + e * entropies[rows])[:, None]))
            at, here = _local(targets[rows], columns)
            g.scatter_add_(1, at[:, None], (grad[rows] * here)[:, None])
            if tiles.temperature != 1.0:
                g.div_(tiles.temperature)
            if d_hidden is not None:
                tiles.accumulate(g, block, d_hidden[rows])
            if into is not None:
                tiles.accumulate(g.t(), h, into)
            if into_bias is not None:
                into_bias.add_(g.sum(0))
        if d_weight is not None and into is not None:
            d_weight[columns] = into
        if d_bias is not None and into_bias is not None:
            d_bias[columns] = into_bias
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


def _local(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Targets as columns of this block (clamped), and whether they are in it."""
    at = targets - columns.start
    width = columns.stop - columns.start
    return at.clamp(0, width - 1), (at >= 0) & (at < width)
