"""A step's batch among ranks: the denominators of all of it on each, its micro-batches dealt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llm_gym.harness.batching.packing import pack
from llm_gym.harness.distributed.world import World
from llm_gym.harness.types import Batch, MicroBatch, TrainSequence


def pack_shard(world: World, rows: Sequence[TrainSequence], *, max_tokens: int, **options: Any) -> Batch:
    """`packing.pack`, of which this rank keeps its share: the same total on every rank, micro-batches dealt.

    Denominators are those of all rows. The token budget is the smallest of any rank, and no more than makes a
    micro-batch for each of them.

    Args:
        world: the ranks.
        rows: of the whole step, the same on every rank.
        max_tokens: this rank's token budget of a micro-batch.
        **options: of `packing.pack`.
    """
    max_tokens = min(world.gather(max_tokens, "packing"))
    batch = pack(rows, max_tokens=max_tokens, **options)
    if world.size == 1 or not batch.micro:
        return batch
    fair = -(-sum(len(m.tokens) for m in batch.micro) // world.size)
    if fair < max_tokens:
        batch = pack(rows, max_tokens=fair, **options)
    return replace(batch, micro=_share(batch.micro, world))


def dummy_batches(world: World, passes: int) -> list[MicroBatch]:
    """Micro-batches of weight 0: what this rank must run beside its `passes` so that all run equally often.

    A pass through a sharded model gathers weights from all ranks, so a rank with less work, or none, must take
    part. Elsewhere there are none. To be asked before the first pass.
    """
    if not world.sharded:
        return []
    return [_nothing()] * (max(world.gather(passes, "counting micro-batches")) - passes)


def _share(micro: Sequence[MicroBatch], world: World) -> tuple[MicroBatch, ...]:
    """The largest micro-batch first, each to the rank with the fewest tokens so far."""
    loads, mine = [0] * world.size, []
    for i in sorted(range(len(micro)), key=lambda i: -len(micro[i].tokens)):
        rank = loads.index(min(loads))
        loads[rank] += len(micro[i].tokens)
        if rank == world.rank:
            mine.append(i)
    return tuple(micro[i] for i in sorted(mine))


def _nothing() -> MicroBatch:
    """One token that weighs nothing."""
    nothing = {"old_logprobs": np.zeros(1), "advantages": np.zeros(1)}
    (batch,) = pack([TrainSequence(np.zeros(2, np.int32), np.array([1]), nothing)], max_tokens=1).micro
    return batch.having(weight=batch.streams["weight"] * 0)
