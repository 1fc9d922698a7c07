"""A step's batch among ranks: each packs what it holds, with the denominators of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_gym.harness.batching.packing import pack, trained_tokens
from llm_gym.harness.distributed.world import World
from llm_gym.harness.types import Batch, MicroBatch, TrainSequence


def pack_shard(world: World, rows: Sequence[TrainSequence], *, max_tokens: int, **options: Any) -> Batch:
    """`packing.pack` for the rows of this rank, with the denominators and the totals of all ranks' rows.

    Args:
        world: the ranks.
        rows: this rank's part of the step; an episode's number is the same, and another's is not, on every rank.
        max_tokens: token budget of a micro-batch.
        **options: of `packing.pack`.
    """
    counts = world.gather(trained_tokens(rows), "packing")
    every = {number: count for counted in counts for number, count in counted.items()}
    return pack(rows, max_tokens=max_tokens, counts=every, **options)


def deal(world: World, rows: Sequence[TrainSequence]) -> list[TrainSequence]:
    """This rank's part of rows that every rank has: the longest first, each to the rank with the fewest tokens."""
    loads, mine = [0] * world.size, []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        rank = loads.index(min(loads))
        loads[rank] += len(rows[i].tokens)
        if rank == world.rank:
            mine.append(i)
    return [rows[i] for i in sorted(mine)]


def dummy_batches(world: World, passes: int) -> list[MicroBatch]:
    """Micro-batches of weight 0: what this rank must run beside its `passes` so that all run equally often.

    A pass through a sharded model gathers weights from all ranks, so a rank with less work, or none, must take
    part. Elsewhere there are none. To be asked before the first pass.
    """
    if not world.sharded:
        return []
    return [_nothing()] * (max(world.gather(passes, "counting micro-batches")) - passes)


def _nothing() -> MicroBatch:
    """One token that weighs nothing."""
    nothing = {"old_logprobs": np.zeros(1), "advantages": np.zeros(1)}
    (batch,) = pack([TrainSequence(np.zeros(2, np.int32), np.array([1]), nothing)], max_tokens=1).micro
    return batch.having(weight=batch.streams["weight"] * 0)
