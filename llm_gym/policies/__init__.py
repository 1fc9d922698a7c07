"""Policies: engines that turn contexts into completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llm_gym.core import Completion, Ids, Sampling

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Policy(Protocol):
    """What the driver and the trainer need of an engine."""

    version: int
    """Version of the weights now serving; every completion carries the one that sampled it."""

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion of `context` (int32 [p]); requests in flight together are batched continuously."""
        ...

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order; the blocking form of `complete`."""
        ...

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Swap in new weights (Hugging Face names) and drop every cache made with the old ones."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
