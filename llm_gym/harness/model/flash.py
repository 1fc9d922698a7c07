"""Flash attention kernels that give their log-sum-exp, and gradients for any of it: one interface for two devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten


class Kernel(Protocol):
    """Flash attention of a call's queries q [S, H, Q, D] over its keys k [S, G, T, D], G dividing H; values as k."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output, shaped as q, and log-sum-exp [S, H, Q, 1]."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v; `out` and `lse` may be those of more keys than these."""
        ...


@dataclass(frozen=True, slots=True)
class CPUFlash:
    """PyTorch's flash attention for CPUs; float16 and bfloat16 have a float32 log-sum-exp."""

    causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, self.causal, scale=scale)
        return out, lse.unsqueeze(-1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        grads: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.squeeze(-1), 0.0, self.causal, scale=scale
        )
        return grads


@dataclass(frozen=True, slots=True)
class CUDAFlash:
    """PyTorch's variable-length flash attention: S = 1, sequences end to end; float16 and bfloat16 only.

    Called as `torch.nn.attention.varlen` calls it, which returns no gradient for its log-sum-exp [H, Q]. Head
    dimensions that are no multiple of 8 are padded with zeros, which changes no score.
    """

    causal: bool
    queries: Tensor
    """Where each sequence's queries start, and the last ends, int32 [sequences + 1]."""
    keys: Tensor
    longest: tuple[int, int]
    """Queries and keys of the longest sequence."""

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], causal: bool, device: torch.device) -> CUDAFlash:
        """For sequences of so many queries and keys."""
        counts = torch.tensor(sizes)
        starts = torch.cat([counts.new_zeros(1, 2), counts.cumsum(0)]).to(device, torch.int32)
        most = counts.amax(0).tolist()
        return cls(causal, starts[:, 0].contiguous(), starts[:, 1].contiguous(), (most[0], most[1]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        flat = (_tokens_first(x) for x in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            *flat, self.queries, self.keys, *self.longest, 0.0, self.causal, False, scale=scale
        )
        return out[..., : q.shape[-1]].transpose(0, 1)[None], lse[None, :, :, None]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        flat = (_tokens_first(x) for x in (grad, q, k, v, out))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        grads = aten._flash_attention_backward(
            *flat,
            lse[0, :, :, 0].contiguous(),
            self.queries,
            self.keys,
            *self.longest,
            0.0,
            self.causal,
            *no_dropout,
            scale=scale,
        )
        dq, dk, dv = (x[..., : q.shape[-1]].transpose(0, 1)[None] for x in grads)
        return dq, dk, dv


def _tokens_first(x: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D'], D' the next multiple of 8."""
    return torch.nn.functional.pad(x[0].transpose(0, 1), (0, -x.shape[-1] % 8)).contiguous()
