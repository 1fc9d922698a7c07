"""Weights to all servers at once, through vLLM's own transfer: who joins, who waits for whom, and what ends it.

vLLM's workers wait inside the collective until the trainer sends, and the trainer until all of them receive: none can
be told to stop. So whatever goes wrong in the middle, or takes too long, ends the run with one sentence; weights that
went by broadcast cannot be sent to one server again. Not verified: no GPU has run it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import urllib.parse
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llm_gym.concurrency.threads import Worker
from llm_gym.errors import PolicyError
from llm_gym.policies.http import RemoteError

if TYPE_CHECKING:
    import torch

    from llm_gym.policies.vllm_server.state import Server

Tensors = Sequence[tuple[str, "torch.Tensor"]]


class Sender(Protocol):
    """The trainer's end; both methods block, in one thread of their own, until the others have done their part."""

    def join(self, address: str, port: int, size: int) -> None:
        """Opens a group of `size` at an address of this machine, as its rank 0."""
        ...

    def send(self, tensors: Tensors) -> None:
        """Sends to all others, in this order."""
        ...


def nccl() -> Sender:
    """The sender of this machine's GPU."""
    from llm_gym.policies.vllm.nccl import NCCLSender

    return NCCLSender()


class Group:
    """The trainer and the workers of all servers, who have joined once and for all."""

    def __init__(self, sender: Sender) -> None:
        self._sender, self._thread = sender, Worker("llm_gym-broadcast")
        self._joined = False

    async def send(self, servers: Sequence[Server], tensors: Tensors, transfer: Transfer, seconds: float) -> None:
        """Brings every server the tensors, which `transfer` describes and the servers want by now.

        Raises:
            PolicyError: not all of them have them within `seconds`.
        """
        if away := [server for server in servers if not server.ready]:
            raise PolicyError(
                f"policy.sync 'nccl' needs every server: {away[0].remote.url} is away ({away[0].reason})."
            )
        if not self._joined:
            await _all([self._join(servers)], seconds, "join")
            self._joined = True
        try:
            sending = self._sending(tensors, transfer)
            await _all([sending, *(server.bring() for server in servers)], seconds, "receive weights")
        finally:
            transfer.over = True

    async def _sending(self, tensors: Tensors, transfer: Transfer) -> None:
        await transfer.all_here.wait()
        await asyncio.wrap_future(self._thread.submit(self._sender.send, tensors=tensors))

    async def _join(self, servers: Sequence[Server]) -> None:
        sizes = [int((await server.remote.call("GET", "/get_world_size"))["world_size"]) for server in servers]
        address = _address(servers[0].remote.url)
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        place = {"address": address, "port": port, "size": 1 + sum(sizes)}
        asked: list[Awaitable[Any]] = [asyncio.wrap_future(self._thread.submit(self._sender.join, **place))]
        for server, offset in zip(servers, itertools.accumulate(sizes, initial=1), strict=False):
            info = {"master_address": address, "master_port": port, "rank_offset": offset, "world_size": place["size"]}
            body = {"init_info": info | {"packed": True}}
            asked.append(server.remote.call("POST", "/init_weight_transfer_engine", body))
        await asyncio.gather(*asked)


class Transfer:
    """One broadcast: what is sent, and the servers that wait for it under their pause."""

    def __init__(self, tensors: Tensors, servers: int) -> None:
        names, kept = zip(*tensors, strict=True)
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in kept]
        self._info = {"names": list(names), "dtype_names": dtypes, "shapes": [list(tensor.shape) for tensor in kept]}
        self._missing, self.all_here, self.over = servers, asyncio.Event(), False

    async def receive(self, server: Server) -> None:
        """A server's part, between its pause and its new label; its workers wait for the sender in the second call.

        Raises:
            RemoteError: it refuses, or the broadcast is over.
        """
        url, call = server.remote.url, server.remote.call
        if self.over:
            raise RemoteError(f"{url} has lost weights that came by broadcast, and cannot be sent them again")
        await call("POST", "/start_weight_update")
        self._missing -= 1
        if not self._missing:
            self.all_here.set()
        await call("POST", "/update_weights", {"update_info": self._info})
        await call("POST", "/finish_weight_update")


async def _all(parts: Sequence[Awaitable[object]], seconds: float, what: str) -> None:
    """Returns when all have ended; the first that fails, or the clock, ends the others."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    done, waiting = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in waiting:
        task.cancel()
    error = next((found for task in done if (found := task.exception())), None)
    if error is None and not waiting:
        return
    if error is not None and not isinstance(error, RemoteError):
        raise error
    why = f"{seconds:g} s are over" if error is None else str(error)
    raise PolicyError(
        f"policy.sync 'nccl': not every server could {what}: {why}. The others wait for it and cannot be told to "
        "stop: start all servers again, and go on with --resume."
    ) from error


def _address(url: str) -> str:
    """The address by which the host of `url` reaches this machine."""
    found = urllib.parse.urlsplit(url)
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as way:  # nothing is sent
        way.connect((found.hostname or "127.0.0.1", found.port or 80))
        return str(way.getsockname()[0])
