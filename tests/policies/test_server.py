"""The server policy against a real HTTP server that fails in every way a vLLM server can.

What it samples is in tests/heavy/test_vllm_server.py; here the fake counts, and only answers as vLLM does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llm_gym.concurrency import Loop
from llm_gym.core import Completion, Sampling
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.policies import make_policy
from llm_gym.policies.http import RemoteError
from llm_gym.policies.vllm_server import state
from llm_gym.policies.vllm_server.addresses import addresses
from llm_gym.policies.vllm_server.labels import Weights, new_run, read
from llm_gym.policies.vllm_server.policy import ServerPolicy
from llm_gym.policies.vllm_server.process import reserved

MODEL = "a/model"
CONTEXT = np.arange(5, dtype=np.int32)
WEIGHTS = {"w": torch.zeros(3)}


class Fake:
    """The routes of a vLLM server, its state, and failures to come, one per completion: `fail`."""

    def __init__(self) -> None:
        self.label, self.version, self.paused = "", "default", False
        self.sees = True
        """Whether it is on the trainer's machine."""
        self.read: list[dict[str, torch.Tensor]] = []
        """The tensors of every file that it was told to load."""
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.fail: deque[str] = deque()
        self.hanging = self.loading = self.resuming = False
        self.holding = self.breaks = ""
        self.broken = False
        self._loop, self._held = Loop("fake"), reserved(0)  # nobody else gets its port while it is away
        self.port = self._held.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """(Again) on the same port, with nothing loaded."""
        self.label, self.version, self.paused, self.hanging, self.broken = "", "default", False, False, False
        self._loop.run(self._start())

    def kill(self) -> None:
        self._loop.run(self._runner.cleanup())

    def stop(self) -> None:
        self.kill()
        self._loop.stop()
        self._held.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.hanging:
            await asyncio.Event().wait()
        path = request.path
        body = json.loads(await request.text() or "{}")
        self.calls.append(body.get("method", path))
        self.broken = self.broken or self.calls[-1] == self.breaks
        if self.broken:
            return web.json_response({"error": {"message": "the engine is dead"}}, status=500)
        if path == "/inference/v1/generate":
            return await self.generate(request, body)
        if path == "/collective_rpc":
            self.loading = body["method"] == "llm_gym_load_file"
            while self.loading and self.holding == "load":
                await asyncio.sleep(0.01)
            found = self.method(body["method"], body["args"])
            plain = found is None or isinstance(found, dict | list)  # of anything else vLLM sends the text
            return web.json_response({"results": [found if plain else str(found)]})
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path in ("/pause", "/resume"):
            self.paused, self.resuming = path == "/pause", path == "/resume"
            while self.resuming and self.holding == "resume":
                await asyncio.sleep(0.01)
        if path == "/v1/models":
            return web.json_response({"data": [{"id": MODEL, "root": MODEL, "parent": None, "max_model_len": 64}]})
        return web.json_response({"success": True})

    def method(self, name: str, args: list[Any]) -> Any:
        if name in ("llm_gym_load_file", "llm_gym_load_adapter_file"):
            path = Path(args[0])
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            self.read.append({k: v for file in files for k, v in load_file(file).items()})
        if name == "llm_gym_set_label":
            self.label = args[0]
        checksums = {"received": {}, "held": {}, "meant": {}, "together": []}
        known: dict[str, Any] = {
            "llm_gym_seen": args[0] if self.sees and args else [],
            "llm_gym_label": self.label,
            "llm_gym_dtype": "torch.float32",
            "llm_gym_checksums": checksums,
        }
        return known.get(name)

    async def generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["token_ids"] == [0]:  # the probe at the start
            return web.json_response(said([1], "x"))
        assert not self.paused
        self.bodies.append(body)
        failure = self.fail.popleft() if self.fail else ""
        if failure == "drop":
            assert request.transport is not None
            request.transport.abort()
        if failure == "hang":
            self.hanging = True
            await asyncio.Event().wait()
        if failure.isdigit():
            return web.json_response({"error": {"message": "it says why"}}, status=int(failure))
        if failure == "garbage":
            return web.Response(text="<html>")
        answer = said([7, 8, 9], "default" if failure == "old" else self.version)
        if failure == "abort":
            answer["choices"][0]["finish_reason"] = "abort"
        if failure == "short":
            del answer["choices"][0]["logprobs"]["content"][0]
        return web.json_response(answer)


def said(tokens: list[int], *versions: str, starts: tuple[int, ...] = (0,), finish: str = "stop") -> dict[str, Any]:
    """An answer of vLLM."""
    spans = [{"version": v, "start": s, "end": len(tokens)} for v, s in zip(versions, starts, strict=True)]
    logprobs = {"content": [{"token_id": t, "logprob": 0.0} for t in tokens]}
    choice = {"index": 0, "token_ids": tokens, "finish_reason": finish, "logprobs": logprobs, "weight_versions": spans}
    return {"choices": [choice]}


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.stop()


@pytest.fixture
def policy(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerPolicy]:
    monkeypatch.setattr(state, "HEARTBEAT", 0.05)
    engine = ServerPolicy(MODEL, servers=[fake.url], retry_seconds=60)
    yield engine
    engine.close()


def ask(policy: ServerPolicy, seed: int = 3, **sampling: Any) -> Completion:
    return policy.generate([CONTEXT], Sampling(**sampling), seeds=[seed])[0]


@pytest.mark.parametrize("failure", ["drop", "500", "503", "429", "garbage", "abort", "short", "old"])
def test_a_failed_request_is_repeated_whole_with_its_seed(policy: ServerPolicy, fake: Fake, failure: str) -> None:
    fake.fail.append(failure)
    completion = ask(policy, seed=11)
    assert completion.tokens.tolist() == [7, 8, 9]
    first, second = fake.bodies
    assert first == second
    assert first["sampling_params"]["seed"] == 11


@pytest.mark.parametrize("status", ["400", "404", "422"])
def test_our_own_mistake_is_not_repeated(policy: ServerPolicy, fake: Fake, status: str) -> None:
    fake.fail.append(status)
    with pytest.raises(PolicyError, match="it says why"):
        ask(policy)
    assert len(fake.bodies) == 1


def test_a_healthy_server_that_always_fails_is_given_up(policy: ServerPolicy, fake: Fake, monkeypatch) -> None:
    monkeypatch.setattr("llm_gym.concurrency.retries.delay", lambda attempt: 0.0)
    fake.fail.extend(["500"] * 50)
    with pytest.raises(PolicyError, match="it says why"):
        ask(policy)
    assert len(fake.bodies) == 6


def test_a_restarted_server_gets_the_weights_before_any_request(
    policy: ServerPolicy, fake: Fake, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(state, "IDLE", 0.0)  # vLLM takes much longer to restart, the fake does not
    policy.load(WEIGHTS.items(), version=4)
    assert ask(policy).version == 4
    fake.kill()
    fake.calls.clear()
    fake.start()
    with caplog.at_level(logging.WARNING):
        assert ask(policy).version == 4
    assert fake.calls.index("llm_gym_load_file") < fake.calls.index("/inference/v1/generate")
    assert fake.calls.count("/inference/v1/generate") == 1
    assert "weights of version 4 sent again" in caplog.text


def test_a_restart_that_breaks_no_connection_is_seen_too(policy: ServerPolicy, fake: Fake) -> None:
    """Behind a proxy the connection stays: the answer itself tells."""
    policy.load(WEIGHTS.items(), version=4)
    assert ask(policy).version == 4
    fake.label, fake.version = "", "default"
    assert ask(policy).version == 4
    assert fake.version.endswith(":4")


def test_weights_are_changed_under_a_pause_that_ends(policy: ServerPolicy, fake: Fake) -> None:
    fake.calls.clear()
    policy.load(WEIGHTS.items(), version=1)
    kept = [call for call in fake.calls if call.startswith(("/pause", "llm_gym_load", "/reset", "/resume"))]
    assert kept == ["/pause", "llm_gym_load_file", "/reset_prefix_cache", "/resume"]
    assert policy.version == 1


def test_an_update_while_a_server_is_given_the_old_weights_is_not_lost(
    policy: ServerPolicy, fake: Fake, monkeypatch
) -> None:
    monkeypatch.setattr(state, "IDLE", 0.0)
    policy.load(WEIGHTS.items(), version=1)
    fake.kill()
    fake.start()
    fake.loading, fake.holding = False, "load"

    async def overtake() -> Completion:
        request = asyncio.create_task(policy.complete(CONTEXT, Sampling()))
        while not fake.loading:
            await asyncio.sleep(0.01)
        update = asyncio.create_task(asyncio.to_thread(policy.load, WEIGHTS.items(), version=2))
        while policy.want.version != 2:
            await asyncio.sleep(0.01)
        fake.holding = ""
        await update
        assert fake.version.endswith(":2")
        return await request

    assert asyncio.run(overtake()).version == 2


def test_an_update_at_the_very_end_of_a_return_is_not_lost(policy: ServerPolicy, fake: Fake, monkeypatch) -> None:
    """The server has the weights that were wanted, but is not there yet: nobody else gives it the new ones."""
    monkeypatch.setattr(state, "IDLE", 0.0)
    policy.load(WEIGHTS.items(), version=1)
    fake.kill()
    fake.start()
    fake.resuming, fake.holding = False, "resume"

    async def overtake() -> Completion:
        request = asyncio.create_task(policy.complete(CONTEXT, Sampling()))
        while not fake.resuming:
            await asyncio.sleep(0.01)
        update = asyncio.create_task(asyncio.to_thread(policy.load, WEIGHTS.items(), version=2))
        while policy.want.version != 2:
            await asyncio.sleep(0.01)
        fake.holding = ""
        await update
        assert fake.version.endswith(":2")
        return await request

    assert asyncio.run(overtake()).version == 2


@pytest.mark.parametrize("call", ["llm_gym_load_file", "llm_gym_checksums"])
def test_an_engine_that_dies_while_it_is_asked_is_waited_for(policy: ServerPolicy, fake: Fake, call: str) -> None:
    """Its server still answers, with errors, until it ends itself."""
    policy.load(WEIGHTS.items(), version=1)
    fake.breaks = call
    with ThreadPoolExecutor(1) as pool:
        if call == "llm_gym_load_file":
            done = pool.submit(policy.load, WEIGHTS.items(), version=2)
        else:
            done = pool.submit(policy.differing, {"w": 0})
        while not done.done() and (not fake.broken or policy.servers[0].ready):
            time.sleep(0.01)
        fake.breaks = ""
        fake.kill()
        fake.start()
        done.result(timeout=60)
    assert ask(policy).version == 1 + (call == "llm_gym_load_file")


def test_weights_that_a_server_refuses_end_the_update(policy: ServerPolicy, fake: Fake, monkeypatch) -> None:
    def refuse(name: str, args: list[Any]) -> Any:
        if name == "llm_gym_load_file":
            raise web.HTTPBadRequest(text="no such tensor")
        return real(name, args)

    real = fake.method
    monkeypatch.setattr(fake, "method", refuse)
    with pytest.raises(PolicyError, match=r"could not take the new weights: .*no such tensor"):
        policy.load(WEIGHTS.items(), version=2)


def test_only_the_latest_weights_stay_in_shared_memory(fake: Fake, tmp_path: Path) -> None:
    policy = ServerPolicy(MODEL, servers=fake.url, folder=tmp_path)
    for version in range(3):
        policy.load(WEIGHTS.items(), version=version)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    policy.close()
    assert not list(tmp_path.iterdir())


def test_a_server_that_stays_away_is_named(policy: ServerPolicy, fake: Fake, caplog) -> None:
    policy.retry_seconds = 0.5
    fake.kill()
    with pytest.raises(PolicyError, match=rf"No server for 0.5 s: .*{re.escape(fake.url)}"):
        ask(policy)
    while f"lost {fake.url}" not in caplog.text:  # said when the next question has no answer either
        time.sleep(0.01)
    fake.start()
    policy.retry_seconds = 60
    assert ask(policy).tokens.tolist() == [7, 8, 9]
    assert f"{fake.url} is back" in caplog.text


def test_a_server_that_hangs_is_left(policy: ServerPolicy, fake: Fake, monkeypatch) -> None:
    monkeypatch.setattr(state, "CONTROL", 0.2)
    fake.fail.append("hang")

    async def until_it_hangs() -> None:
        task = asyncio.create_task(policy.complete(CONTEXT, Sampling(), seed=1))
        while not fake.hanging:
            await asyncio.sleep(0.01)
        while policy.servers[0].ready:
            await asyncio.sleep(0.01)
        fake.hanging = False
        assert (await task).tokens.tolist() == [7, 8, 9]

    asyncio.run(until_it_hangs())
    assert len(fake.bodies) == 2


def test_another_server_takes_over_and_the_lost_one_catches_up(fake: Fake, monkeypatch) -> None:
    other = Fake()
    policy = ServerPolicy(MODEL, servers=[fake.url, other.url])
    fake.kill()
    policy.load(WEIGHTS.items(), version=2)
    assert [c.version for c in policy.generate([CONTEXT] * 20, Sampling())] == [2] * 20
    assert len(other.bodies) == 20
    fake.start()
    while not all(server.ready for server in policy.servers):
        time.sleep(0.01)
    assert fake.version == other.version
    policy.generate([CONTEXT] * 20, Sampling())
    assert fake.bodies
    policy.close()
    other.stop()


def test_requests_that_come_together_after_a_pause_are_shared(fake: Fake, monkeypatch) -> None:
    """Each server is asked for its label first; none of them may look idle until it has answered."""
    monkeypatch.setattr(state, "IDLE", 0.0)
    other = Fake()
    policy = ServerPolicy(MODEL, servers=[fake.url, other.url])
    policy.generate([CONTEXT] * 20, Sampling())
    assert [len(fake.bodies), len(other.bodies)] == [10, 10]
    policy.close()
    other.stop()


def test_a_next_turn_goes_where_its_beginning_is_cached(fake: Fake) -> None:
    other = Fake()
    policy = ServerPolicy(MODEL, servers=[other.url, fake.url])
    first = np.arange(32, dtype=np.int32)
    policy.servers[0].load = 1  # the first turn goes to the second server
    policy.generate([first], Sampling())
    policy.servers[0].load, policy.servers[1].load = 0, 1
    policy.generate([np.concatenate([first, [7, 8, 9, 5]])], Sampling())
    assert (len(other.bodies), len(fake.bodies)) == (0, 2)
    policy.servers[1].load = 9  # clearly busier
    policy.generate([np.concatenate([first, [7, 8, 9, 5]])], Sampling())
    assert (len(other.bodies), len(fake.bodies)) == (1, 2)
    policy.close()
    other.stop()


def test_a_group_goes_where_its_prompt_is_computed(fake: Fake) -> None:
    """Its members ask at the same moment, before any has an answer; the groups are shared out."""
    other = Fake()
    policy = ServerPolicy(MODEL, servers=[fake.url, other.url])
    groups = [np.full(40, number, np.int32) for number in range(1, 5)]
    policy.generate([prompt for prompt in groups for _ in range(4)], Sampling(max_tokens=4))
    at = [[body["token_ids"][0] for body in server.bodies] for server in (fake, other)]
    assert [len(each) for each in at] == [8, 8]
    assert not set(at[0]) & set(at[1])
    policy.close()
    other.stop()


def test_closing_fails_what_is_under_way(policy: ServerPolicy, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits for a server that hangs no longer than for any other at the end."""
    monkeypatch.setattr(state, "LEAVING", 0.05)
    fake.fail.append("hang")
    began = time.monotonic()

    async def close() -> None:
        task = asyncio.create_task(policy.complete(CONTEXT, Sampling()))
        while not fake.hanging:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(policy.close)
        with pytest.raises(PolicyError, match="closed"):
            await task
        with pytest.raises(PolicyError, match="closed"):
            await policy.complete(CONTEXT, Sampling())

    asyncio.run(close())
    assert time.monotonic() - began < state.CONTROL


def test_a_context_without_room_is_not_sent(policy: ServerPolicy, fake: Fake) -> None:
    with pytest.raises(PolicyError, match="64"):
        policy.generate([np.zeros(64, np.int32)], Sampling())
    assert not fake.bodies
    ask(policy, max_tokens=1000)
    assert fake.bodies[0]["sampling_params"]["max_tokens"] == 64 - len(CONTEXT)


class TestSettings:
    def test_nobody_there(self) -> None:
        with pytest.raises(ConfigError, match=r"http://127.0.0.1:1 is not up after 0.1 s .*llmgym serve"):
            ServerPolicy(MODEL, servers="http://127.0.0.1:1", start_seconds=0.1)

    def test_waiting_is_told(self, fake: Fake) -> None:
        fake.kill()
        told: list[str] = []

        def on_wait(text: str) -> None:
            if not told:
                fake.start()
            told.append(text)

        ServerPolicy(MODEL, servers=fake.url, on_wait=on_wait).close()
        assert told[0].startswith(f"waiting for {fake.url}")

    def test_it_is_said_at_once_and_not_waited_for_unless_asked(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(ConfigError, match=r"http://127.0.0.1:1 is not up after 5 s .*start_seconds=60"):
            ServerPolicy(MODEL, servers="http://127.0.0.1:1")
        assert "waiting for http://127.0.0.1:1, 5 s more" in caplog.records[0].getMessage()

    def test_another_model(self, fake: Fake) -> None:
        with pytest.raises(ConfigError, match="serves 'a/model', not 'b/model'"):
            ServerPolicy("b/model", servers=fake.url)

    def test_a_server_without_our_methods(self, fake: Fake, monkeypatch) -> None:
        monkeypatch.setattr(fake, "method", lambda name, args: 1 / 0)
        with pytest.raises(ConfigError, match=r"cannot take new weights .*llmgym serve"):
            ServerPolicy(MODEL, servers=fake.url)

    def test_something_else_answers(self, fake: Fake, monkeypatch) -> None:
        async def handle(request: web.Request) -> web.Response:
            return web.json_response({})

        monkeypatch.setattr(fake, "handle", handle)
        fake.kill()
        fake.start()
        with pytest.raises(ConfigError, match="does not answer as a vLLM server does"):
            ServerPolicy(MODEL, servers=fake.url)

    def test_raw_log_probabilities(self, fake: Fake, monkeypatch) -> None:
        answer = said([1], "x")
        answer["choices"][0]["logprobs"]["content"][0]["logprob"] = -0.7
        monkeypatch.setattr(fake, "generate", lambda *args: asyncio.sleep(0, web.json_response(answer)))
        with pytest.raises(ConfigError, match="raw log-probabilities"):
            ServerPolicy(MODEL, servers=fake.url)

    def test_a_limit_above_the_servers(self, fake: Fake) -> None:
        with pytest.raises(ConfigError, match="max_context: got 65, but the servers' limit is 64"):
            ServerPolicy(MODEL, servers=fake.url, max_context=65)

    @pytest.mark.parametrize("servers", ["", [], "localhost:8000", ["http://a", "http://a/"]])
    def test_addresses_that_are_none(self, servers: Any) -> None:
        with pytest.raises(ConfigError, match="servers"):
            addresses(servers)

    def test_several_in_one_string(self) -> None:
        assert addresses("http://a:1, http://b:2/") == ["http://a:1", "http://b:2"]

    def test_by_name(self, fake: Fake) -> None:
        engine = make_policy(MODEL, engine="server", servers=fake.url, version=3)
        assert isinstance(engine, ServerPolicy)
        assert (engine.version, engine.max_context, engine.dtype) == (3, 64, torch.float32)
        engine.close()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6))
def test_spans_become_versions(spans: list[tuple[int, int]]) -> None:
    """Every token gets its span's version, whether or not neighbours have the same."""
    starts = tuple(np.cumsum([0, *(length for length, _ in spans)]).tolist())
    labels = [f"run:{i}:0:{version}" for i, (_, version) in enumerate(spans)]
    completion = read(said(list(range(starts[-1])), *labels, starts=starts[:-1]), None, "run")
    assert completion.versions.tolist() == [version for length, version in spans for _ in range(length)]
    versions = [completion.version, *(version for _, version in completion.updates)]
    assert all(a != b for a, b in itertools.pairwise(versions))


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        said([], "run:1:0:0"),
        said([1], "other:1:0:0"),
        said([1], "changing"),
        said([1, 2], "run:1:0:0", starts=(1,)),
        said([1], "run:1:0:0", finish="abort"),
        said([1], starts=()),
        None,
    ],
)
def test_an_answer_that_does_not_count_may_pass(answer: Any) -> None:
    with pytest.raises(RemoteError) as caught:
        read(answer, None, "run")
    assert caught.value.passing


def test_a_vllm_without_spans_counts_if_nothing_changed_meanwhile() -> None:
    answer = said([1], "x")
    del answer["choices"][0]["weight_versions"]
    assert read(answer, Weights("run", 2, 2, 5), "run").versions.tolist() == [5]
    with pytest.raises(RemoteError):
        read(answer, None, "run")


@pytest.mark.parametrize(
    ("label", "adapter", "kept"),
    [("", None, False), ("run:1:1:7", True, True), ("run:9:9:7", True, False), ("old:1:1:7", True, False)],
)
def test_an_adapter_alone_leaves_the_weights_beneath_it(label: str, adapter: bool | None, kept: bool) -> None:
    weights = Weights("run", 3, 1, 8, Path("w"), Path("a") if adapter else None)
    assert weights.on(label) is kept


def test_a_fresh_server_has_what_it_was_started_with() -> None:
    assert Weights("run", 0, 0, 0).on("")
    assert not Weights("run", 0, 0, 0).on("run:1:1:1")
    assert not Weights("run", 0, 0, 0).on("other:0:0:0")


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process, and the label that a policy there would have given a server."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=-1, text=True) as process:
        yield process, f"{new_run().replace(f'.{os.getpid()}.', f'.{process.pid}.')}:7:7:7"
        process.kill()


def test_a_server_of_a_run_that_is_alive_is_refused(fake: Fake, other: tuple[subprocess.Popen[str], str]) -> None:
    """And left alone; when that run is over, what it left is replaced."""
    process, fake.label = other
    for label in (fake.label, f"{fake.label.partition(':')[0]}:changing"):
        fake.label = label
        with pytest.raises(ConfigError) as caught:
            ServerPolicy(MODEL, servers=[fake.url])
        assert f"{fake.url} is in use by the run of process {process.pid} on {socket.gethostname()}" in str(
            caught.value
        )
    assert not {"/pause", "llm_gym_set_label"} & set(fake.calls)
    process.kill()
    process.wait()
    policy = ServerPolicy(MODEL, servers=[fake.url])
    assert ask(policy).tokens.tolist() == [7, 8, 9]
    policy.close()


def test_a_server_that_was_let_go_is_anybodys_though_that_process_lives_on(fake: Fake) -> None:
    """A notebook that has closed its policy, for one."""
    first = ServerPolicy(MODEL, servers=[fake.url])
    asyncio.run(asyncio.to_thread(first.load, WEIGHTS.items(), version=1))
    held = fake.label
    first.close()
    assert f".{os.getpid()}." in held
    assert fake.label == f"{held.partition('.')[0]}:{held.partition(':')[2]}"


@pytest.mark.parametrize("alive", [True, False])
def test_a_server_that_another_run_has_taken_ends_this_one(
    policy: ServerPolicy, fake: Fake, other: tuple[subprocess.Popen[str], str], alive: bool
) -> None:
    """Not one is loaded over the other for ever; it ends as a setting does, not as an episode."""
    process, label = other
    if not alive:
        process.kill()
        process.wait()
    policy.load(WEIGHTS.items(), version=1)
    fake.label = fake.version = label
    loaded = fake.calls.count("llm_gym_load_file")
    with pytest.raises(ConfigError, match=f"has been taken over by the run of process {process.pid}"):
        ask(policy)
    with pytest.raises(ConfigError, match="has been taken over by"):
        policy.load(WEIGHTS.items(), version=2)
    assert fake.calls.count("llm_gym_load_file") == loaded
    assert fake.label == label
