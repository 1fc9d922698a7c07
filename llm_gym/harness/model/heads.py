"""Log-probabilities and entropies of given tokens, and losses of them, without the full [tokens x vocabulary] logits.

The logits of one chunk of tokens at a time, [V, n], are made in one reused buffer, and turned there into probabilities
and then into their own gradient. Memory is that of a chunk, however many tokens there are. Two forms:

- `token_logprobs` for anything: backward makes each chunk's logits again. 4 matrix products.
- `token_loss` for a loss that takes each token on its own: with a chunk's logits everything is known, so the
  gradients are formed in the forward pass, from the same logits. 3 matrix products, as with full logits. The idea
  is that of fused linear cross-entropy (Liger, https://arxiv.org/abs/2410.10989); here the loss may be any.

With p = softmax, l = log p, H = entropy: d logprob / d x_j = [j = target] - p_j, and d H / d x_j = -p_j (l_j + H).
Logits may be soft-capped, x = c tanh(z / c) (Gemma 2, https://arxiv.org/abs/2408.00118); d x / d z = 1 - (x / c)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """How much is worked on at once."""

    tokens: int
    """Most tokens of a chunk; matrix products gain nothing above."""
    logits: int
    """Most logits of a chunk: the memory."""
    piece: int
    """Logits that are made probabilities at once; on a CPU they should stay in its cache."""
    block: int
    """Vocabulary entries whose weights are converted at once, where they are not in the working precision."""


SIZES = {"cpu": Sizes(512, 20 * 2**20, 2**17, 8192)}
"""By device type. That is at most 80 MB of float32 logits: 512 tokens at a vocabulary of 32k, 128 at 152k."""
ACCELERATOR = Sizes(8192, 2**28, 2**26, 2**15)
"""Of every other device, where a chunk must be large to keep it busy: 1 GB."""

PerToken = Callable[[slice, Tensor, Tensor], Tensor]
"""(which tokens, their log-probabilities [n], their entropies [n]) -> their losses [n]."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-softmax of `(hidden @ weight.T + bias) / temperature` at `targets`, and the entropy.

    With a soft cap c, what is divided by the temperature is `c * tanh((hidden @ weight.T + bias) / c)`.

    Products and sums are float32 whatever the inputs (float64 for float64 inputs), also under autocast;
    bfloat16 products on CUDA run on bfloat16 inputs with float32 results.

    Args:
        hidden: [M, H], differentiable.
        weight: [V, H], differentiable or frozen.
        targets: [M] int64, in [0, V).
        bias: [V] or None, differentiable or frozen.
        temperature: divides the logits; > 0.
        softcap: bound of the logits before the temperature, approached smoothly; > 0, or None.
        entropy: whether to compute the entropy (differentiable); zeros otherwise, at a lower price.

    Returns:
        (logprobs [M], entropy [M]) in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an id outside the vocabulary, or a temperature that is not positive.
    """
    _check("token_logprobs", hidden, weight, targets, temperature, softcap)
    logprobs, entropies = _LogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, float(temperature), softcap, entropy
    )
    return logprobs, entropies


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    per_token: PerToken,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
) -> Tensor:
    """The sum of `per_token` losses of what `token_logprobs` would return, at three quarters of its price.

    `per_token` is called in the forward pass for consecutive chunks of tokens. It is differentiated there, so it
    must take each token on its own: what it returns for one may not depend on another that it is given.

    Args:
        hidden: [M, H], differentiable.
        weight: [V, H], differentiable or frozen.
        targets: [M] int64, in [0, V).
        per_token: (slice of the M tokens, logprobs [n], entropy [n]) -> losses [n], weighted as they shall be summed.
        bias: [V] or None, differentiable or frozen.
        temperature: divides the logits; > 0.
        softcap: as for `token_logprobs`.
        entropy_gradient: whether the entropy is differentiable; a constant otherwise, at a lower price.

    Returns:
        The loss, a scalar. Its gradients are formed already: it can be gone back through once.

    Raises:
        ValueError: as `token_logprobs`, or losses that are not one per token.
    """
    _check("token_loss", hidden, weight, targets, temperature, softcap)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        targets,
        float(temperature),
        softcap,
        entropy_gradient,
        per_token,
        torch.is_grad_enabled(),
    )
    return loss


def _check(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, cap: float | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name}: want hidden [M, H], weight [V, H], targets [M], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"{name}: temperature: got {temperature!r}, want a value > 0.")
    if cap is not None and not cap > 0:
        raise ValueError(f"{name}: softcap: got {cap!r}, want a value > 0, or None.")
    if len(targets) and not (targets.min() >= 0 and targets.max() < len(weight)):
        worst = int(targets.max() if targets.min() >= 0 else targets.min())
        raise ValueError(f"{name}: targets: got {worst}, want ids in [0, {len(weight)}).")


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, targets, temperature, softcap)
            logprobs, entropies, log_z = (head.none.new_empty(len(targets)) for _ in range(3))
            for rows in head:
                found = head.normalise(rows, head.logits(rows), entropy=entropy)
                logprobs[rows], entropies[rows], log_z[rows] = found.logprobs, found.entropies, found.log_z
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, log_z)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, log_z = ctx.saved_tensors
        grad = torch.zeros_like(entropies) if grad is None else grad
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, targets, ctx.temperature, ctx.softcap)
            into = _Gradients(head, ctx.needs_input_grad)
            for rows in head:
                pull = None if entropy_grad is None else entropy_grad[rows]
                into.add(rows, *head.gradient(rows, head.logits(rows), log_z[rows], entropies[rows], grad[rows], pull))
        return *into.found(), None, None, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        entropy_gradient: bool,
        per_token: PerToken,
        grad: bool,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, targets, temperature, softcap)
            into = _Gradients(head, ctx.needs_input_grad) if grad else None
            total = head.none.sum()
            for rows in head:
                x = head.logits(rows)
                keep = entropy_gradient or softcap is not None  # whose slope is of the logits
                found = head.normalise(rows, x, entropy=True, keep=keep)
                loss, by_logprob, by_entropy = _differentiate(per_token, rows, found, entropy_gradient)
                total = total + loss
                if into is not None and keep:
                    pull = by_entropy if entropy_gradient else None
                    into.add(rows, *head.gradient(rows, x, found.log_z, found.entropies, by_logprob, pull))
                elif into is not None:
                    into.add(rows, *head.from_exponentials(rows, x, found.total, by_logprob))
        # An attribute, not saved tensors: they are no activations, and are gone once they are handed over.
        ctx.found = None if into is None else into.found()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError(
                "token_loss: its gradients were handed over already; it cannot be gone back through twice."
            )
        scale = float(grad)
        if scale != 1.0:
            found = tuple(None if each is None else each.mul_(scale) for each in found)
        return *found, None, None, None, None, None, None


class Normalised(NamedTuple):
    """Of a chunk of n tokens, [n] each."""

    logprobs: Tensor
    entropies: Tensor
    """Zeros where they were not asked for."""
    log_z: Tensor
    """Log of the sum of exp(logits)."""
    total: Tensor
    """Sum of exp(logits - the largest)."""


def _differentiate(
    per_token: PerToken, rows: slice, found: Normalised, entropy_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a chunk, and its gradient by each log-probability and each entropy."""
    logprobs = found.logprobs.detach().requires_grad_()
    entropies = found.entropies.detach().requires_grad_(entropy_gradient)
    with torch.enable_grad():
        losses = per_token(rows, logprobs, entropies)
        if losses.shape != logprobs.shape:
            raise ValueError(f"token_loss: per_token: want losses {tuple(logprobs.shape)}, got {tuple(losses.shape)}.")
        loss = losses.sum()
    if not loss.requires_grad:
        return loss, torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    given = [logprobs, entropies] if entropy_gradient else [logprobs]
    grads = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[0], grads[-1]


class _Head:
    """Chunks of tokens, and what is done with the logits of one; they stand in one reused buffer.

    They stand as [V, n], a token's logits in a column: so all three products run along the rows of the weights, which
    is 5% faster on a CPU, and a piece of them is consecutive memory.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, heat: float, cap: float | None
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.scale = hidden, weight, bias, targets, 1 / heat
        self.cap = None if cap is None else cap / heat
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.half = hidden.is_cuda and hidden.dtype == torch.bfloat16
        self.work = hidden.dtype if self.half else self.exact
        self.sizes, self.width = SIZES.get(hidden.device.type, ACCELERATOR), len(weight)
        room = self.sizes.logits // self.width
        room -= room % 16 if room > 16 else 0  # products are slower at odd sizes
        self.rows = max(1, min(self.sizes.tokens, room, len(hidden)))
        self.piece = max(1, min(self.sizes.piece // self.rows, self.width))
        self.none = torch.empty(0, dtype=self.exact, device=hidden.device)
        self.buffer = self.none.new_empty(self.width * self.rows)
        self.spare = self.none.new_empty(2, self.piece * self.rows)

    def __iter__(self) -> Iterator[slice]:
        return _slices(len(self.hidden), self.rows)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary entries, their weights in the working precision); all at once if they are in it."""
        for block in _slices(self.width, self.width if self.weight.dtype == self.work else self.sizes.block):
            yield block, self.weight[block].to(self.work)

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out = a @ b / temperature, or added to it; accumulated in `exact`."""
        if self.half:
            result = torch.mm(a, b, out_dtype=torch.float32).mul_(self.scale)
            out.copy_(result.add_(out) if add else result)
        else:
            torch.addmm(out, a, b, beta=float(add), alpha=self.scale, out=out)

    def logits(self, rows: slice) -> Tensor:
        """(weight @ hidden.T + bias) / temperature, soft-capped, [V, n]; overwrites the buffer."""
        hidden = self.hidden[rows].to(self.work).t()
        x = self.buffer[: self.width * hidden.shape[1]].view(self.width, -1)
        for block, weight in self.blocks():
            self.product(weight, hidden, x[block])
        if self.bias is not None:
            x.add_(self.bias[:, None], alpha=self.scale)
        return x if self.cap is None else x.div_(self.cap).tanh_().mul_(self.cap)

    def normalise(self, rows: slice, x: Tensor, *, entropy: bool, keep: bool = False) -> Normalised:
        """What there is to know of a chunk; leaves exp(x - the largest) in `x`, or `x` as it is."""
        chosen, peak = x.gather(0, self.targets[None, rows])[0], x.amax(0)
        total, moment = torch.zeros_like(peak), torch.zeros_like(peak)
        for part, (shifted, spare) in self.pieces(x):
            torch.sub(x[part], peak, out=shifted)
            weights = torch.exp(shifted, out=spare if keep else x[part])
            total += weights.sum(0)
            if entropy:
                moment += shifted.mul_(weights).sum(0)
        log_total = total.log()
        entropies = log_total - moment / total if entropy else torch.zeros_like(total)
        return Normalised((chosen - peak) - log_total, entropies, peak + log_total, total)

    def pieces(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(entries of a piece, two reused buffers of its shape)."""
        for part in _slices(len(x), self.piece):
            yield part, self.spare[:, : x[part].numel()].view(2, *x[part].shape)

    def from_exponentials(self, rows: slice, x: Tensor, total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient by the logits, -grad * (p - [target]), as (factor [n], matrix [V, n]); p = x / total."""
        return -grad / total, x.scatter_add_(0, self.targets[None, rows], -total[None])

    def gradient(
        self, rows: slice, x: Tensor, log_z: Tensor, entropies: Tensor, grad: Tensor, pull: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same from logits, which it overwrites; if `pull` is given, it is the gradient [n] by the entropies.

        Logits that are soft-capped move by 1 - (logit / cap)^2 of what goes into the cap.
        """
        targets, one = self.targets[None, rows], torch.ones_like(grad)
        slope = one if self.cap is None else 1 - (x.gather(0, targets)[0] / self.cap).square()
        for part, (logp, slopes) in self.pieces(x):
            torch.sub(x[part], log_z, out=logp)
            if self.cap is not None:
                torch.div(x[part], self.cap, out=slopes).square_().neg_().add_(1)
            p = torch.exp(logp, out=x[part])
            if pull is not None:
                p.mul_(logp.mul_(pull).add_(grad + pull * entropies))
            if self.cap is not None:
                p.mul_(slopes)
        if pull is None:
            return -grad, x.scatter_add_(0, targets, -slope[None])
        return -one, x.scatter_add_(0, targets, -(grad * slope)[None])


class _Gradients:
    """Sums of the gradients of hidden states, weights and bias over the chunks."""

    def __init__(self, head: _Head, needs: tuple[bool, ...]) -> None:
        self.head, self.first = head, True
        new = head.none.new_empty if len(head.hidden) else head.none.new_zeros
        self.hidden = torch.empty_like(head.hidden) if needs[0] else None
        self.weight = new(head.weight.shape) if needs[1] else None
        self.bias = None if head.bias is None or not needs[2] else head.none.new_zeros(len(head.bias))

    def add(self, rows: slice, factor: Tensor, matrix: Tensor) -> None:
        """Adds a chunk whose gradient by the logits is factor * matrix, [V, n].

        The factor is applied to the hidden states' side of the products, which is narrower.
        """
        head, states = self.head, self.head.hidden[rows].to(self.head.exact)
        back, scaled = torch.zeros_like(states), (states * factor[:, None]).to(head.work)
        for block, weight in head.blocks():
            part = matrix[block].to(head.work)
            if self.hidden is not None:
                head.product(part.t(), weight, back, add=True)
            if self.weight is not None:
                head.product(part, scaled, self.weight[block], add=not self.first)
        if self.hidden is not None:
            self.hidden[rows] = back.mul_(factor[:, None]).to(self.hidden.dtype)
        if self.bias is not None:
            self.bias.addmv_(matrix, factor, alpha=head.scale)
        self.first = False

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weights and bias in their types; None where none is needed."""
        kinds = (self.head.weight.dtype, self.head.weight.dtype if self.head.bias is None else self.head.bias.dtype)
        weight, bias = (None if g is None else g.to(k) for g, k in zip((self.weight, self.bias), kinds, strict=True))
        return self.hidden, weight, bias


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
