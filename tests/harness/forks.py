"""Processes that train together, forked from this one, so that real ranks cost a second and no new imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from llm_gym.harness.distributed.world import ParallelConfig, World, connect


def reserved() -> socket.socket:
    """A socket with a port that nobody is given who asks for any, while it is open, and that a store can listen at.

    Between a moment when a port was free and one when the first rank listens, other tests open many.
    """
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("", 0))
    return made


def in_ranks(size: int, work: Callable[[World], Any], strategy: str = "ddp") -> list[Any]:
    """What `work` returns on each of `size` ranks, in order; it must be picklable."""
    processes = multiprocessing.get_context("fork")
    place = reserved()
    port = place.getsockname()[1]
    ends = [processes.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        processes.Process(target=_rank, args=(rank, size, port, strategy, work, end), daemon=True)
        for rank, (_, end) in enumerate(ends)
    ]
    for rank, (_, end) in zip(ranks, ends, strict=True):
        rank.start()
        end.close()  # here, so that reading ends with the process
    try:
        return [begin.recv() for begin, _ in ends]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
        place.close()


def _rank(rank: int, size: int, port: int, strategy: str, work: Callable[[World], Any], end: Connection) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    world = connect(ParallelConfig(strategy, timeout=60))  # type: ignore[arg-type]
    found = work(world)
    world.close()
    end.send(found)
