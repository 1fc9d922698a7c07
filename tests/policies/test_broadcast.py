"""The control flow of vLLM's NCCL transfer, with a stand-in for the broadcast: who joins, who waits, what ends it.

The requests are those of vLLM 0.32's routes; that NCCL then moves the tensors is not tested here.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from aiohttp import web
from test_server import CONTEXT, MODEL, Fake, ask

from llm_gym.core import Sampling
from llm_gym.errors import ConfigError, PolicyError, SettingError
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.weight_sync.transports import modes_of
from llm_gym.policies.vllm_server import broadcast, state
from llm_gym.policies.vllm_server.policy import ServerPolicy

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
Tensors = Sequence[tuple[str, torch.Tensor]]


class Wire:
    """The stand-in: a group that all members must join, and a queue to each receiver; its other end is the sender."""

    def __init__(self) -> None:
        self.place: tuple[str, int, int] | None = None
        self.receivers: dict[int, queue.SimpleQueue[Tensors]] = {}
        self.full = threading.Event()
        self.received = threading.Semaphore(0)

    def join(self, address: str, port: int, size: int) -> None:
        self.place = address, port, size
        assert self.full.wait(60)

    def joined(self, info: dict[str, Any], workers: int) -> queue.SimpleQueue[Tensors]:
        mine: queue.SimpleQueue[Tensors] = queue.SimpleQueue()
        for rank in range(info["rank_offset"], info["rank_offset"] + workers):
            assert rank not in self.receivers
            self.receivers[rank] = mine
        if len(self.receivers) == info["world_size"] - 1:
            self.full.set()
        return mine

    def send(self, tensors: Tensors) -> None:
        """As NCCL it ends when all have received, and not before."""
        for receiver in self.receivers.values():
            receiver.put(tensors)
        for _ in self.receivers:
            self.received.acquire()


class Receiver(Fake):
    """A fake vLLM with `workers` processes, at the other end of a wire."""

    def __init__(self, wire: Wire, workers: int = 1) -> None:
        self.wire, self.workers, self.fault = wire, workers, ""
        self.info: dict[str, Any] = {}
        self.held: list[dict[str, torch.Tensor]] = []
        super().__init__()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        text = await request.text()
        if path == "/get_world_size":
            return web.json_response({"world_size": self.workers})
        if path == "/init_weight_transfer_engine":
            self.info = json.loads(text)["init_info"]
            self.mine = self.wire.joined(self.info, self.workers)
        if path in ("/start_weight_update", "/finish_weight_update"):
            assert self.paused
        if path == "/update_weights":
            assert self.calls[-1] == "/start_weight_update"
            if self.fault == "refuse":
                raise web.HTTPBadRequest(text="another backend")
            if self.fault == "die":
                request.transport.abort()  # type: ignore[union-attr]
            if self.fault:
                await asyncio.Event().wait()
            await self.receive(json.loads(text)["update_info"])
        return await super().handle(request)

    async def receive(self, info: dict[str, Any]) -> None:
        for _ in range(self.workers):
            while self.mine.empty():
                await asyncio.sleep(0.005)
            tensors = self.mine.get()
            assert info["names"] == [name for name, _ in tensors]
            assert info["shapes"] == [list(tensor.shape) for _, tensor in tensors]
            assert [getattr(torch, name) for name in info["dtype_names"]] == [tensor.dtype for _, tensor in tensors]
            self.held.append({name: tensor.clone() for name, tensor in tensors})
            self.wire.received.release()


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    found = Wire()
    monkeypatch.setattr("llm_gym.policies.vllm_server.policy.nccl", lambda: found)
    monkeypatch.setattr(state, "HEARTBEAT", 0.05)
    return found


@pytest.fixture
def servers(wire: Wire) -> Iterator[list[Receiver]]:
    found = [Receiver(wire), Receiver(wire, workers=2)]
    yield found
    for server in found:
        server.stop()


@pytest.fixture
def policy(servers: list[Receiver]) -> Iterator[ServerPolicy]:
    engine = ServerPolicy(MODEL, servers=[server.url for server in servers], retry_seconds=60)
    yield engine
    engine.close()


def test_every_worker_receives_every_tensor_under_one_pause(
    policy: ServerPolicy, servers: list[Receiver], wire: Wire
) -> None:
    for version in (1, 2):
        for server in servers:
            server.calls.clear()
        new = {name: (tensor + version).double() for name, tensor in WEIGHTS.items()}
        policy.load_broadcast(new.items(), version=version)
        for server in servers:
            for held in server.held[-server.workers :]:
                assert {name: tensor.dtype for name, tensor in held.items()} == dict.fromkeys(new, torch.float32)
                assert all(torch.equal(held[name], new[name].float()) for name in new)
            kept = [
                call
                for call in server.calls
                if call.startswith(("/pause", "/start", "/update_weights", "/fin", "/res"))
            ]
            assert kept == [
                "/pause",
                "/start_weight_update",
                "/update_weights",
                "/finish_weight_update",
                "/reset_prefix_cache",
                "/resume",
            ]
            assert server.label.endswith(f":{version}")
        assert policy.version == ask(policy).version == version
        assert policy.update_seconds["pause"] > 0


def test_the_group_is_joined_once_with_a_rank_for_each_worker(
    policy: ServerPolicy, servers: list[Receiver], wire: Wire
) -> None:
    for version in (1, 2):
        policy.load_broadcast(WEIGHTS.items(), version=version)
    address, port, size = wire.place
    assert (address, size) == ("127.0.0.1", 4)
    place = {"master_address": address, "master_port": port, "world_size": size, "packed": True}
    assert [server.info for server in servers] == [place | {"rank_offset": 1}, place | {"rank_offset": 2}]
    assert [server.calls.count("/init_weight_transfer_engine") for server in servers] == [1, 1]


@pytest.mark.parametrize(
    ("fault", "told"),
    [("die", "Server disconnected"), ("refuse", "answered 400: another backend"), ("hang", "0.5 s are over")],
)
def test_a_receiver_that_is_lost_in_the_middle_ends_it_in_one_sentence(
    policy: ServerPolicy, servers: list[Receiver], fault: str, told: str
) -> None:
    """The other one waits in the collective, and so does the sender's thread: neither holds up the end."""
    policy.load_broadcast(WEIGHTS.items(), version=1)
    policy.retry_seconds = 0.5 if fault == "hang" else 60
    servers[1].fault = fault
    with pytest.raises(PolicyError, match=rf"policy.sync 'nccl': not every server could receive.*{told}.*--resume"):
        policy.load_broadcast(WEIGHTS.items(), version=2)
    assert not any(server.label.endswith(":2") for server in servers[1:])


def test_a_receiver_that_does_not_join_ends_it_too(policy: ServerPolicy, servers: list[Receiver], monkeypatch) -> None:
    policy.retry_seconds = 0.5
    monkeypatch.setattr(servers[1].wire, "joined", lambda *args: None)
    with pytest.raises(PolicyError, match="not every server could join: 0.5 s are over"):
        policy.load_broadcast(WEIGHTS.items(), version=1)


def test_a_server_that_restarted_is_not_sent_them_again(
    policy: ServerPolicy, servers: list[Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on; the next update says what is missing."""
    monkeypatch.setattr(state, "IDLE", 0.0)
    policy.load_broadcast(WEIGHTS.items(), version=1)
    servers[1].kill()
    servers[1].start()
    while "cannot be sent them again" not in policy.servers[1].reason:
        found = policy.generate([CONTEXT] * 2, Sampling())
        assert [completion.version for completion in found] == [1, 1]
    assert servers[1].label.endswith("changing")
    with pytest.raises(PolicyError, match=rf"needs every server: {servers[1].url} is away .*cannot be sent them again"):
        policy.load_broadcast(WEIGHTS.items(), version=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(SettingError, match=r"policy.sync: 'nccl' sends from a CUDA device, and there is none"):
        broadcast.nccl()


def test_it_is_a_row_that_must_be_asked_for() -> None:
    def modes(*sets: str, sharded: bool = False, **policy: Any) -> list[str]:
        return modes_of(
            load(TrainConfig, sets=sets, policy={"servers": ["http://a"], **policy}), "server", sharded=sharded
        )

    assert modes(sync="nccl") == ["nccl"]
    assert "nccl" not in modes()
    with pytest.raises(ConfigError, match="nccl"):
        modes(sync="nccl", sharded=True)
