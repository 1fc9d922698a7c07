"""The forward of models whose past the engine cannot cache: for each new token the whole row is computed again.

States of recurrent layers, keys of several shapes, positions that depend on the length of the row: what a plain forward
of a row computes is right for all of them, and slow. A vLLM engine is quicker where it knows the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llm_gym.policies.builtin.kv_cache import attention
from llm_gym.policies.builtin.self_test import forget_lengths


@dataclass(frozen=True, slots=True)
class Uncached:
    """Logits after the last tokens of whole rows."""

    model: Any
    together: bool
    """Whether rows may share a forward, padded on the right; else each has its own."""
    attention: str
    """Transformers' attention implementation; of no use for a model without attention."""

    def __call__(self, rows: Sequence[npt.NDArray[np.integer]], most: int) -> Tensor:
        """The logits, [n, vocabulary].

        Args:
            rows: integers [p] each, p >= 1.
            most: tokens of one forward, padding included, unless a single row has more.
        """
        order = np.argsort([len(row) for row in rows], kind="stable")
        found: list[Tensor] = []
        start = 0
        with ExitStack() as stack:
            if getattr(self.model.config, "_attn_implementation", None):
                stack.enter_context(attention(self.model, self.attention))
            while start < len(order):
                stop = start + 1
                while self.together and stop < len(order) and len(rows[order[stop]]) * (stop + 1 - start) <= most:
                    stop += 1
                found.append(self._last([rows[i] for i in order[start:stop]]))
                start = stop
        return torch.cat(found)[np.argsort(order)]

    def _last(self, rows: Sequence[npt.NDArray[np.integer]]) -> Tensor:
        """Logits of rows that share one forward; the head is applied to their last tokens alone."""
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)

        def keep(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0][torch.arange(len(rows), device=device), last][:, None], *args[1:]

        forget_lengths(self.model)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            logits: Tensor = self.model(input_ids=ids.to(device), use_cache=False).logits[:, -1]
        finally:
            hook.remove()
        return logits
