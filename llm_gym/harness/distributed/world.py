"""The processes that train together: who they are, what they share, and who is missing when one does not come.

Every process (rank) runs the same program. It plays its own share of the step's tasks, hears how all the others went,
fixes the same denominators, trains on what it played, and adds its gradient to the others': gradients are sums over
ranks, because the weights of `batching` already hold the denominators of the whole step.

`World()` is one process alone: there every function here is the identity.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from llm_gym.errors import PolicyError, RankError
from llm_gym.harness.bounds import Within
from llm_gym.harness.distributed.heartbeat import Watch
from llm_gym.harness.distributed.network import name_interface
from llm_gym.harness.settings import checked

T = TypeVar("T")
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)
"""What an error says whose cause is in another process."""

COMING = 600.0
"""Seconds that processes have to come, at the least: they are not started at one moment, and import at their pace."""
BUCKET = 1 << 24
"""Most gradient elements that travel in one piece."""


@checked("parallel")
@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How several processes share the work; of no effect in one."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every process holds the whole model. `fsdp`: each holds a part of every weight (FSDP2)."""
    timeout: Annotated[float, Within("(0, inf)")] = 1800.0
    """Seconds that a process waits for the others; the slowest rollout of a step must fit."""


class World:
    """The ranks of a run, and this one among them.

    Args:
        rank: this process's number, from 0.
        size: how many there are.
        config: how they share the work.
        device: where this rank computes.
        store: where they leave word for each other; None for a process alone.
        group: carries Python objects and what lies on a CPU.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        config: ParallelConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        store: Any = None,
        group: Any = None,
    ) -> None:
        self.rank, self.size, self.config = rank, size, config or ParallelConfig()
        self.device, self.group = torch.device(device), group
        self.neighbours = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        """How many of them are on this machine, this one included."""
        self._watch = None if store is None else Watch(store, rank, size, self.config.timeout)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of every weight."""
        return self.size > 1 and self.config.strategy == "fsdp"

    # Sharing

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share: every `size`-th item."""
        return items[self.rank :: self.size]

    def unshard(self, mine: Sequence[T], what: str, *, each: int = 1) -> list[T]:
        """What all ranks made of their shares, in the order before `shard`, on every rank.

        Args:
            mine: `each` results for each item of the share.
            what: for errors: what is being done.
            each: results of one item.
        """
        parts = [[part[i : i + each] for i in range(0, len(part), each)] for part in self.gather(mine, what)]
        longest = max(map(len, parts))
        return [result for i in range(longest) for part in parts if i < len(part) for result in part[i]]

    def gather(self, value: T, what: str) -> list[T]:
        """The value of every rank, in order, on every rank.

        Raises:
            RankError: one of them is gone or stuck.
        """
        if self.size == 1:
            return [value]
        with self.together(what):
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, value, group=self.group)
        return found

    def send_to_rank0(self, value: T, rank: int, what: str) -> T:
        """What `rank` (not 0) holds, on rank 0; the others do nothing, and keep what they have.

        Raises:
            RankError: one of the two is gone.
        """
        box = [value]
        with self.blame_lost_rank(what):
            if self.rank == rank:
                dist.send_object_list(box, dst=0, group=self.group)
            elif self.rank == 0:
                dist.recv_object_list(box, src=rank, group=self.group)
        return box[0]

    def on_rank0(self, make: Callable[[], T], what: str) -> T:
        """What `make` gives, or raises, on rank 0 alone; on every rank."""
        if self.size == 1:
            return make()
        made: Any = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as error:
                made = error
        made = self.gather(made, what)[0]
        if isinstance(made, Exception):
            raise made
        result: T = made
        return result

    def on_all_ranks(self, make: Callable[[], T], what: str) -> T:
        """What `make` gives here, begun by all together; if it fails on one, all raise the error that came first.

        One that only tells of a lost connection comes last: it may be quicker than the error that caused it.
        """
        if self.size == 1:
            return make()
        self.meet(what)
        made: Any = None
        failed = None
        try:
            made = make()
        except Exception as error:
            failed = (bool(_LOST.search(str(error))), time.time(), error)
        if errors := [each for each in self.gather(failed, what) if each is not None]:
            raise min(errors, key=itemgetter(0, 1))[2]
        result: T = made
        return result

    def meet(self, what: str) -> None:
        """Waits until every rank is here."""
        self.gather(None, what)

    def reduce_max(self, row: Mapping[str, Any], what: str) -> dict[str, Any]:
        """A row of metrics with the largest number of any rank (the slowest time, the widest gap)."""
        rows = self.gather(dict(row), what)
        return {k: max(r[k] for r in rows if k in r) if isinstance(v, float) else v for k, v in row.items()}

    # Training

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up every rank's gradients; sharded ones are already summed by their backward pass.

        A parameter that has a gradient on some ranks only counts as zero on the others; one that has none anywhere
        keeps none.
        """
        if self.size == 1 or self.sharded:
            return
        with self.together("adding gradients"):
            for bucket in _buckets([p for p in parameters if p.requires_grad]):
                self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[nn.Parameter]) -> None:
        has = torch.tensor([p.grad is not None for p in bucket]).to(bucket[0])
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        flat = torch.cat([*parts, has])
        dist.all_reduce(flat)
        *sums, has = torch.split(flat, [p.numel() for p in bucket] + [len(bucket)])
        for parameter, total, some in zip(bucket, sums, has.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).clone() if some else None

    def add(self, totals: Mapping[str, float], what: str) -> dict[str, float]:
        """Sums by name over all ranks; a name that a rank does not have counts as 0 there."""
        rows = self.gather(dict(totals), what)
        names = {name: None for row in rows for name in row}  # in order, unlike a set
        return {name: sum(row.get(name, 0.0) for row in rows) for name in names}

    # Waiting

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All ranks begin this; if one does not come, or is lost meanwhile, its name is said.

        Raises:
            RankError: a rank is gone or stuck.
        """
        if self._watch is not None:
            self._watch.wait(what)
        with self.blame_lost_rank(what):
            yield

    @contextmanager
    def blame_lost_rank(self, what: str) -> Iterator[None]:
        """If something fails in here because a rank is lost, its name is said.

        Raises:
            RankError: in place of torch's `RuntimeError`, or of the engine's error that it caused.
        """
        try:
            yield
        except (RuntimeError, PolicyError) as error:
            cause = error.__cause__ if isinstance(error, PolicyError) else error
            if self._watch is None or not isinstance(cause, RuntimeError):
                raise
            try:
                self._watch.blame(what)
            except RankError as named:
                raise named from error
            raise

    def close(self) -> None:
        """Takes leave of the others: together, or, while an error is on its way, at once, and they are told."""
        if self._watch is None:
            return
        if sys.exception() is None:
            self._watch.over.set()  # whoever holds the store may be gone right after the meeting
            self.meet("the end")
        self._watch.stop()
        self._watch = None
        dist.destroy_process_group()


def connect(config: ParallelConfig, device: torch.device | str = "cpu") -> World:
    """Joins the processes that torchrun has started; without it this one is alone.

    Args:
        config: how they share the work.
        device: `cpu` (gloo) or `cuda` (NCCL; each process on a machine takes the next GPU).

    Raises:
        RankError: the others did not come.
    """
    rank, size = here()
    device = torch.device(device)
    if size == 1:
        return World(config=config, device=device)
    backend, timeout, coming = "gloo", datetime.timedelta(seconds=config.timeout), max(config.timeout, COMING)
    if device.type == "cuda":
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    name_interface(os.environ["MASTER_ADDR"])
    Stores.count += 1
    if Stores.base is None:
        try:
            Stores.base, *_ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=coming)))
        except dist.DistError as error:
            raise RankError(f"rank {rank}: the other processes did not come within {coming:g} s.") from error
    store = PrefixStore(f"llm_gym/{Stores.count}", Stores.base)
    dist.init_process_group(backend, store=PrefixStore("c10d", store), rank=rank, world_size=size, timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, config, device=device, store=store, group=group)


class Stores:
    """The store that torchrun's variables lead to; one for all the runs of a process, numbered."""

    base: Any = None
    count = 0


def here() -> tuple[int, int]:
    """This process's rank and the number of processes, from torchrun's environment variables; (0, 1) without them."""
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, at most `BUCKET` elements of them (a larger one goes alone)."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(p.numel() for p in bucket) + parameter.numel()
        if bucket and (size > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
