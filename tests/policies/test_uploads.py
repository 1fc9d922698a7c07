"""Weights to a server on another host: through the gate as uvicorn runs it, over a wire that fails, to a fake vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch
import uvicorn
from safetensors.torch import save_file
from test_server import MODEL, Fake, ask

from llm_gym.access import token_of
from llm_gym.concurrency import Loop
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.policies.vllm_server import delivery, gate, state
from llm_gym.policies.vllm_server.gate import Gate
from llm_gym.policies.vllm_server.policy import ServerPolicy
from llm_gym.policies.vllm_server.process import reserved

SECRET = "s3cret"
WEIGHTS = {"a": torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)), "b": torch.arange(3.0)}
"""Four megabytes: more than a socket holds."""
MEGABYTE = 1 << 20


class Host:
    """Another machine: a gate before a fake vLLM, and the wire to it."""

    def __init__(self, fake: Fake, folders: Sequence[Path], token: str = SECRET) -> None:
        self.fake, self.folders, self.token = fake, folders, token
        fake.sees = False
        self.fault, self.carried = "", 0
        """What happens once a connection has carried a megabyte, once; bytes that were sent to the server in all."""
        self.passed: list[tuple[str, int]] = []
        """What the fake was asked, and the bytes that had been carried by then."""
        self._loop = Loop("host")
        self._inner, self._outer = reserved(0), reserved(0)
        self.url = f"http://127.0.0.1:{self._outer.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        app = Gate(self._pass_on, token=self.token, folders=self.folders)
        self._server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        self._loop.run(self._start())

    def stop(self) -> None:
        self._loop.run(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.stop()
        self._inner.close()
        self._outer.close()

    async def _start(self) -> None:
        port = self._inner.getsockname()[1]
        self._server.config.port = port
        self._serving = asyncio.ensure_future(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._wire = await asyncio.start_server(self._carry, "127.0.0.1", self._outer.getsockname()[1])

    async def _stop(self) -> None:
        self._wire.close()
        self._server.should_exit = self._server.force_exit = True
        await self._serving

    async def _pass_on(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.passed.append((scope["path"], self.carried))
        url = f"{self.fake.url}{scope['path']}?{scope['query_string'].decode()}"
        kind = {"Content-Type": "application/json"}
        async with aiohttp.request(scope["method"], url, data=body or None, headers=kind) as got:
            await send({"type": "http.response.start", "status": got.status, "headers": []})
            await send({"type": "http.response.body", "body": await got.read()})

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._inner.getsockname()[1])

        async def forth() -> None:
            count = 0
            while piece := await reader.read(1 << 16):
                count, self.carried = count + len(piece), self.carried + len(piece)
                if count > MEGABYTE and self.fault:
                    fault, self.fault = self.fault, ""
                    if fault == "cut":
                        back.transport.abort()
                        writer.transport.abort()
                    if fault == "stall":
                        await asyncio.Event().wait()
                    piece = bytes([piece[0] ^ 1]) + piece[1:]  # "flip"
                back.write(piece)
                await back.drain()

        async def home() -> None:
            while piece := await there.read(1 << 16):
                writer.write(piece)
                await writer.drain()

        with contextlib.suppress(OSError):
            await asyncio.wait([asyncio.ensure_future(each()) for each in (forth, home)], return_when="FIRST_COMPLETED")
        back.close()
        writer.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.stop()


@pytest.fixture
def host(fake: Fake, tmp_path: Path) -> Iterator[Host]:
    folder = tmp_path / "there"
    folder.mkdir()
    machine = Host(fake, [folder])
    yield machine
    machine.close()


@pytest.fixture
def policy(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerPolicy]:
    monkeypatch.setattr(state, "HEARTBEAT", 0.05)
    engine = ServerPolicy(MODEL, servers=[host.url], token=SECRET, retry_seconds=60)
    yield engine
    engine.close()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def left(host: Host) -> list[Path]:
    return [path for folder in host.folders for path in folder.rglob("*") if path.is_file()]


def test_weights_arrive_whole_in_one_upload_and_are_removed(policy: ServerPolicy, host: Host, fake: Fake) -> None:
    fake.calls.clear()
    policy.load(WEIGHTS.items(), version=1)
    (read,) = fake.read
    assert same(read, WEIGHTS)
    assert ask(policy).version == 1
    assert left(host) == []
    assert 4 * MEGABYTE < host.carried < 5 * MEGABYTE


def test_the_upload_is_over_before_requests_are_held(policy: ServerPolicy, host: Host, fake: Fake) -> None:
    """And the two are measured apart."""
    host.passed.clear()
    begun, before = time.monotonic(), host.carried
    policy.load(WEIGHTS.items(), version=1)
    took = time.monotonic() - begun
    carried = dict(host.passed)
    assert carried["/pause"] - before > 4 * MEGABYTE
    assert carried["/resume"] - carried["/pause"] < MEGABYTE
    assert set(policy.update_seconds) == {"pause", "transfer"}
    assert all(seconds > 0 for seconds in policy.update_seconds.values())
    assert sum(policy.update_seconds.values()) <= took


def test_adapters_too(policy: ServerPolicy, host: Host, fake: Fake) -> None:
    policy.load({"w": torch.ones(2)}.items(), version=0)
    policy.load_adapter(WEIGHTS.items(), {"r": 4}, version=1)
    assert same(fake.read[-1], WEIGHTS)
    fake.label, fake.version = "", "default"  # it restarted: base and adapter are sent again
    assert ask(policy).version == 1
    assert same(fake.read[-2], {"w": torch.ones(2)})
    assert same(fake.read[-1], WEIGHTS)
    assert left(host) == []


def test_a_folder_of_several_files(policy: ServerPolicy, host: Host, fake: Fake, tmp_path: Path) -> None:
    for name, tensor in WEIGHTS.items():
        save_file({name: tensor}, tmp_path / f"model-{name}.safetensors")
    policy.load_folder(tmp_path, version=1)
    assert same(fake.read[-1], WEIGHTS)


def test_nothing_travels_on_one_host(policy: ServerPolicy, host: Host, fake: Fake) -> None:
    fake.sees = True
    policy.load(WEIGHTS.items(), version=1)
    assert same(fake.read[-1], WEIGHTS)
    assert host.carried < MEGABYTE


def test_a_server_here_and_one_elsewhere(host: Host, fake: Fake) -> None:
    """Each gets the weights its own way."""
    near = Fake()
    policy = ServerPolicy(MODEL, servers=[near.url, host.url], token=SECRET)
    policy.load(WEIGHTS.items(), version=1)
    assert same(near.read[-1], fake.read[-1])
    assert near.label == fake.label == policy.want.label
    assert 4 * MEGABYTE < host.carried < 5 * MEGABYTE
    policy.close()
    near.stop()


@pytest.mark.parametrize("fault", ["cut", "flip", "stall"])
def test_an_upload_that_fails_in_the_middle_is_repeated(
    policy: ServerPolicy, host: Host, fake: Fake, monkeypatch, caplog, fault: str
) -> None:
    """Nothing of the first is loaded, or stays."""
    monkeypatch.setattr(delivery, "STALL", 0.5)
    host.fault = fault
    policy.load(WEIGHTS.items(), version=1)
    assert not host.fault
    (read,) = fake.read
    assert same(read, WEIGHTS)
    assert ask(policy).version == 1
    assert left(host) == []
    assert "weights of version 1 sent again" in caplog.text


def test_weights_without_room_are_refused_before_they_travel(
    policy: ServerPolicy, host: Host, fake: Fake, monkeypatch
) -> None:
    monkeypatch.setattr(gate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    with pytest.raises(PolicyError, match=r"answered 413: the weights take 0.00419 GB, .* has 0.002 GB left"):
        policy.load(WEIGHTS.items(), version=1)
    assert host.carried < MEGABYTE
    assert not fake.read
    assert not left(host)


def test_the_next_folder_has_room(policy: ServerPolicy, host: Host, fake: Fake, tmp_path: Path, monkeypatch) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    host.stop()
    host.folders = [small, large]
    host.start()
    free = {small: 5_000_000, large: 50_000_000}
    monkeypatch.setattr(gate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[Path(folder)]))
    for name in ("model-1", "model-2"):  # the first alone would fit in the small one
        save_file({name: torch.ones(MEGABYTE)}, tmp_path / f"{name}.safetensors")
    policy.load_folder(tmp_path, version=1)
    assert len(fake.read[-1]) == 2


@pytest.mark.parametrize(("token", "told"), [("", "was started with a token"), ("wrong", "not the one that it was")])
def test_without_the_token_nothing_is_answered(host: Host, fake: Fake, token: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"token: {host.url}/v1/models answered 401: .*{told}.*LLM_GYM_TOKEN"):
        ServerPolicy(MODEL, servers=[host.url], token=token)
    assert set(fake.calls) <= {"/health"}


def test_the_token_of_the_environment(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_GYM_TOKEN", SECRET)
    ServerPolicy(MODEL, servers=[host.url]).close()
    with pytest.raises(ConfigError, match="answered 401"):
        ServerPolicy(MODEL, servers=[host.url], token="other")


def test_a_server_that_comes_back_with_another_token_is_waited_for(policy: ServerPolicy, host: Host) -> None:
    policy.load(WEIGHTS.items(), version=1)
    policy.retry_seconds = 0.5
    host.stop()
    host.token = "other"
    host.start()
    with pytest.raises(PolicyError, match=r"No server for 0.5 s: .*answered 401: the token is not the one"):
        ask(policy)
    host.stop()
    host.token, policy.retry_seconds = SECRET, 60
    host.start()
    assert ask(policy).version == 1


@pytest.mark.parametrize("token", ["two words", "\n", "ß", 12345])
def test_tokens_that_no_header_holds(token: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy.server.token: got (one|a)") as caught:
        token_of(token, "policy.server.token")
    assert "word" in str(caught.value) or "quotes" in str(caught.value)
    assert str(token) not in str(caught.value)


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("it was let through")


def asked(door: Gate, method: str, path: str, *pieces: bytes, query: str = "", **headers: str) -> tuple[int, bytes]:
    """What the gate answers itself; the connection is lost after the pieces if their lengths say less than the header."""
    said: list[Any] = []
    length = int(headers.get("content_length", sum(map(len, pieces))))
    whole = sum(map(len, pieces)) >= length
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request"} if whole else {"type": "http.disconnect"})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": lines}
    asyncio.run(door(scope, receive, send))
    return (said[0]["status"], said[1]["body"]) if said else (0, b"")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("PUT", "run/1/../../../etc", {"content_length": "2"}, 404),
        ("PUT", "../1/model", {"content_length": "2"}, 404),
        ("PUT", "run/1/.model", {"content_length": "2"}, 404),
        ("PUT", "run/1/", {"content_length": "2"}, 404),
        ("PUT", "run/model", {"content_length": "2"}, 404),
        ("GET", "run/1/model", {}, 404),
        ("DELETE", "..", {}, 404),
        ("DELETE", "", {}, 404),
        ("PUT", "run/1/model", {}, 411),
        ("PUT", "run/1/model", {"content_length": "-2"}, 411),
        ("PUT", "run/1/model", {"content_length": "1"}, 400),
        ("PUT", "run/1/model", {"content_length": "3"}, 0),
    ],
)
def test_what_cannot_be_asked_for_leaves_nothing(
    tmp_path: Path, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    door = Gate(nothing, token="", folders=[folder])
    found, _ = asked(door, method, f"/llm_gym/weights/{path}", b"ab", **headers)
    assert found == status
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_what_a_dead_trainer_left_makes_room(tmp_path: Path) -> None:
    door = Gate(nothing, token="", folders=[tmp_path])
    for run in ("one", "one", "two"):
        _, body = asked(door, "PUT", f"/llm_gym/weights/{run}/1/model", b"abc", b"de", content_length="5")
        assert hashlib.sha256(b"abcde").hexdigest().encode() in body
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    assert (tmp_path / "two" / "1" / "model").read_bytes() == b"abcde"


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crett", "Basic s3cret", "s3cret"])
def test_only_the_whole_token_opens(tmp_path: Path, given: str) -> None:
    door = Gate(nothing, token=SECRET, folders=[tmp_path])
    for path in (
        "/collective_rpc",
        "/llm_gym/weights/run/1/model",
        "/metrics",
        "/health/../collective_rpc",
        "//health",
    ):
        status, body = asked(door, "PUT", path, b"ab", content_length="2", authorization=given)
        assert status == 401
        assert SECRET.encode() not in body
    with pytest.raises(AssertionError, match="let through"):
        asked(door, "GET", "/health", authorization=given)
    with pytest.raises(AssertionError, match="let through"):
        asked(door, "GET", "/metrics", authorization=f"Bearer {SECRET}")
