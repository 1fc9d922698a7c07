"""Real vLLM servers, started as `llmgym serve` starts them: exact, and whole again after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import engine_checks
import numpy as np
import peft
import psutil
import pytest
import torch
from engine_checks import contexts
from leftovers import living
from sandbox_tiers import within

from llm_gym.core import Completion, Episode, Ids, Sampling, StopReason, Turn
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.harness.batching.packing import pack, sequences
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import load_model
from llm_gym.models.checksums import checksums
from llm_gym.policies.openai import OpenAIPolicy
from llm_gym.policies.vllm_server.policy import ServerPolicy
from llm_gym.policies.vllm_server.process import EXTENSION, ServerProcess, checked, command, known_arguments
from llm_gym.rollouts.driver import rollout
from llm_gym.trajectories import trajectories

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

CONTEXT = 512
GENERATED = "vllm:generation_tokens_total"
SETTINGS = {"dtype": "float32", "max_model_len": CONTEXT, "enable_lora": True, "max_lora_rank": 8}


class Servers:
    """Server processes by port, so that one can be killed, and `llmgym serve` started in its place."""

    def __init__(self) -> None:
        self.running: dict[int, ServerProcess] = {}
        self.commands: dict[int, subprocess.Popen[str]] = {}

    def start(self) -> ServerProcess:
        server = ServerProcess(settings=SETTINGS)
        self.running[server.port] = server
        return server

    def replace(self, port: int) -> subprocess.Popen[str]:
        """Kills the server of that port, unless `llmgym serve` has its place already."""
        if port not in self.commands:
            self.running[port].kill()
            sets = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
            self.commands[port] = serve("--port", str(port), *sets, stdout=subprocess.DEVNULL)
        return self.commands[port]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    found = Servers()
    yield found
    for serving in found.commands.values():
        serving.terminate()
        serving.wait()
    for server in found.running.values():
        server.stop()


@pytest.fixture(scope="module")
def first(servers: Servers) -> str:
    server = servers.start()
    server.wait()
    return server.url


@pytest.fixture
def policy(first: str) -> Iterator[ServerPolicy]:
    engine = ServerPolicy(servers=[first], start_seconds=600)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model(None)


def moved(seed: int) -> torch.nn.Module:
    """The embedded model, every tensor moved."""
    model = load_model(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def gaps(
    model: torch.nn.Module, episodes: list[Episode], temperature: float = 1.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """|engine - learner| log-probability of every sampled token of each episode, and the tokens' versions."""
    learner, found = Learner(model), []
    for episode in episodes:
        (row,) = sequences(episode)
        (micro,) = pack([row], max_tokens=4096).micro
        logprobs, _ = learner.logprobs(micro, temperature=temperature)
        gap = (logprobs - micro.streams["old_logprobs"]).abs().detach().numpy()
        assert len(gap) == episode.tokens_generated
        found.append((gap, np.concatenate([turn.completion.versions for turn in episode.turns])))
    return found


def played(prompts: list[Ids], completions: list[Completion]) -> list[Episode]:
    return [
        Episode("e", 0, trajectories((Turn(p, c, 0.0),)), StopReason.ANSWERED)
        for p, c in zip(prompts, completions, strict=True)
    ]


def worst(model: torch.nn.Module, episodes: list[Episode], temperature: float = 1.0) -> float:
    return max(float(gap.max()) for gap, _ in gaps(model, episodes, temperature))


Asked = tuple[list[Ids], list[Completion]]
"""Contexts, and what was sampled in each."""


async def ask_on(policy: ServerPolicy, prompts: list[Ids], over: threading.Event) -> Asked:
    """A completion of each prompt, and another, until `over`: of unlike lengths, so some are under way at any moment."""

    async def one_after_another(i: int) -> list[tuple[Ids, Completion]]:
        sampling, found = Sampling(max_tokens=80 + 3 * i, stop_token_ids=()), []
        while not over.is_set():
            found.append((prompts[i], await policy.complete(prompts[i], sampling, seed=100 * i + len(found))))
        return found

    every = await asyncio.gather(*map(one_after_another, range(len(prompts))))
    asked, said = zip(*itertools.chain(*every), strict=True)
    return list(asked), list(said)


def metric(url: str, *names: str) -> float:
    """The sum of some of the server's metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def running(url: str) -> float:
    """Requests that the server's engine has, running or waiting."""
    return metric(url, "vllm:num_requests_running", "vllm:num_requests_waiting{")


def test_arguments_are_looked_at_before_anything_starts() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert {field.name for field in dataclasses.fields(AsyncEngineArgs)} <= known_arguments()
    with pytest.raises(ConfigError, match="did you mean 'gpu_memory_utilization'"):
        checked({"gpu_memory_utilisation": 0.5})
    with pytest.raises(ConfigError, match="--port"):
        checked({"port": 1})
    line = command("m", 8000, {"block_size": 16, "max_model_len": 64})
    pairs = {a: b for a, b in itertools.pairwise(line) if a.startswith("--")}
    assert (pairs["--host"], pairs["--port"], pairs["--model"]) == ("127.0.0.1", "8000", "m")
    assert (pairs["--block-size"], pairs["--max-model-len"]) == ("16", "64")
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--worker-extension-cls"] == EXTENSION
    assert {"--enable-scale-out", "--enable-prefix-caching"} <= set(line)


@pytest.mark.parametrize(
    ("temperature", "filters", "updated"),
    [(1.0, "off", False), *((*each, True) for each in engine_checks.COMBINATIONS)],
)
def test_4096_tokens_agree(policy, model, temperature: float, filters: str, updated: bool) -> None:
    """With the server's own weights (other samplings of those: test_vllm_policy), and after an update."""
    if updated:
        model = moved(8)
        policy.load(model.state_dict().items(), version=1)
    prompts, how = engine_checks.contexts(64), engine_checks.sampling(temperature, filters)
    completions = policy.generate(prompts, how, seeds=range(64))
    assert sum(len(c.tokens) for c in completions) == 4096
    assert {c.finish_reason for c in completions} == {"length"}
    assert {int(v) for c in completions for v in c.versions} == {int(updated)}
    assert engine_checks.worst(model, prompts, completions, how) <= engine_checks.TOLERANCE


def test_seeds_decide_and_stop_tokens_stay(policy) -> None:
    prompts, sampling = contexts(8), Sampling(max_tokens=24, stop_token_ids=tuple(range(0, 500, 3)))
    one, two = (policy.generate(prompts, sampling, seeds=[5] * 8) for _ in range(2))
    assert [c.tokens.tolist() for c in one] == [c.tokens.tolist() for c in two]
    for completion in one:
        ends = [int(t) % 3 == 0 and t < 500 for t in completion.tokens]
        assert not any(ends[:-1])
        assert completion.finish_reason == ("stop" if ends[-1] else "length")


def test_new_weights_are_served_from_the_next_token_on(policy, model) -> None:
    """An update while requests are under way, and one while none is; each token against its own weights."""
    prompts, other, updated = contexts(32), moved(1), threading.Event()

    async def with_update() -> Asked:
        url = policy.servers[0].remote.url
        before = metric(url, GENERATED)
        asked = asyncio.create_task(ask_on(policy, prompts, updated))
        while await asyncio.to_thread(metric, url, GENERATED) < before + len(prompts):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(policy.load, other.state_dict().items(), version=7)
        updated.set()
        return await asked

    of_each, across = asyncio.run(with_update())
    assert any(c.version == 0 and [version for _, version in c.updates] == [7] for c in across)
    assert all(set(c.versions) <= {0, 7} for c in across)
    for weights, version in ((model, 0), (other, 7)):
        found = gaps(weights, played(of_each, across))
        assert np.concatenate([gap[of == version] for gap, of in found]).max() <= 1e-4
        assert np.concatenate([gap[of != version] for gap, of in found]).max() > 0.1
    after = policy.generate(prompts, Sampling(max_tokens=20, stop_token_ids=()), seeds=range(32))
    assert {c.version for c in after} == {7}
    assert not any(c.updates for c in after)
    assert worst(other, played(prompts, after)) <= 1e-4


def test_another_policy_starts_from_the_servers_own_weights(first: str, model) -> None:
    for _ in range(2):
        policy = ServerPolicy(servers=first)
        completions = policy.generate(contexts(8), Sampling(max_tokens=64, stop_token_ids=()), seeds=range(8))
        assert worst(model, played(contexts(8), completions)) <= 1e-4
        policy.load(moved(2).state_dict().items(), version=1)
        policy.close()


def test_what_every_tensor_became_is_proven(policy, model) -> None:
    """The checksums see each tensor that is off by one bit of one element."""
    other = moved(4)
    tensors = dict(other.state_dict())
    policy.load(tensors.items(), version=1)
    expected = checksums(tensors.items(), policy.dtype)
    assert policy.differing(expected) == []
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"):
        off = tensors[name].clone()
        off.view(-1)[-1] = torch.nextafter(off.view(-1)[-1], torch.tensor(torch.inf))
        assert policy.differing(expected | checksums([(name, off)], policy.dtype)) == [name]
    assert policy.differing(checksums(model.state_dict().items(), policy.dtype)) != []


def test_a_folder_is_loaded_and_may_be_deleted(policy, tmp_path) -> None:
    other = moved(5)
    other.save_pretrained(tmp_path / "model")
    policy.load_folder(tmp_path / "model", version=3)
    shutil.rmtree(tmp_path / "model")
    completions = policy.generate(contexts(8), Sampling(max_tokens=32, stop_token_ids=()), seeds=range(8))
    assert {c.version for c in completions} == {3}
    assert worst(other, played(contexts(8), completions)) <= 1e-4


def adapted(
    seed: int, base: torch.nn.Module | None = None
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, object]]:
    """A model (None: the embedded one) with a random adapter, the adapter's tensors, and its configuration."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base or load_model(None), config)
    tensors = peft.get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    return model.merge_and_unload().requires_grad_(True), held, plain


def test_adapters_are_replaced_and_dropped(policy, model, caplog) -> None:
    prompts, sampling = contexts(8), Sampling(max_tokens=64, stop_token_ids=())
    for version in (1, 2):
        merged, tensors, config = adapted(version)
        policy.load_adapter(tensors.items(), config, version=version)
        completions = policy.generate(prompts, sampling, seeds=range(8))
        assert {c.version for c in completions} == {version}
        assert worst(merged, played(prompts, completions)) <= 1e-4
        assert worst(model, played(prompts, completions)) > 0.1
        assert policy.differing(checksums(tensors.items(), policy.dtype)) == []
    policy.load(moved(6).state_dict().items(), version=3)
    completions = policy.generate(prompts, sampling, seeds=range(8))
    assert worst(moved(6), played(prompts, completions)) <= 1e-4
    assert not caplog.records  # every update was taken at once


def test_a_cancelled_request_ends_in_the_server(policy, first: str) -> None:
    async def cancel() -> None:
        sampling = Sampling(max_tokens=400, stop_token_ids=())
        task = asyncio.create_task(policy.complete(contexts(1)[0], sampling))
        while not running(first):
            if task.done():  # it was not looked at while it was under way
                task = asyncio.create_task(policy.complete(contexts(1)[0], sampling))
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while running(first):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(cancel(), timeout=240))


def test_a_request_that_cannot_work_is_refused_at_once(policy) -> None:
    with pytest.raises(PolicyError, match="512"):
        asyncio.run(policy.complete(np.zeros(CONTEXT, np.int32), Sampling()))
    with pytest.raises(PolicyError, match="out of vocabulary"):
        asyncio.run(policy.complete(np.full(3, 10**6, np.int32), Sampling()))


def test_a_wrong_model_is_refused_in_one_sentence(first: str) -> None:
    with pytest.raises(ConfigError, match=r"serves .*embedded.*not 'other/model'"):
        ServerPolicy("other/model", servers=[first])


def test_the_chat_endpoint_plays_episodes_as_text(first: str, monkeypatch) -> None:
    """The same server as a plain OpenAI-compatible endpoint: greedy text is the policy's own, decoded."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    play = {"env": "Arithmetic-v0", "seeds": range(16), "sampling": Sampling(temperature=0, max_tokens=64)}
    engines = (ServerPolicy(servers=first), OpenAIPolicy(served(first), base_url=f"{first}/v1"))
    ours, theirs = (rollout(play["env"], e, seeds=play["seeds"], sampling=play["sampling"]) for e in engines)
    for engine in engines:
        engine.close()
    assert [e.messages for e in ours] == [e.messages for e in theirs], [e.error for e in theirs]
    assert [e.reward for e in ours] == [e.reward for e in theirs]


def served(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def test_a_rollout_survives_kill_9(servers: Servers, first: str, caplog) -> None:
    """Every group whole, no token twice, each against the weights that it says it is from; the log tells.

    What comes back has neither the model's weights nor the adapter, and is sent both.
    """
    other, tensors, config = adapted(7, moved(3))
    policy = ServerPolicy(servers=[first], retry_seconds=600)
    policy.load(moved(3).state_dict().items(), version=4)
    policy.load_adapter(tensors.items(), config, version=5)
    port = int(first.rpartition(":")[2])
    ended: list[Episode] = []
    killed = threading.Event()
    episodes: list[Episode] = []

    def on_episode(episode: Episode) -> None:
        ended.append(episode)
        if len(ended) == 8:
            servers.running[port].kill()
            killed.set()

    def play() -> None:
        episodes.extend(
            rollout(
                "GuessNumber-v0",
                policy,
                seeds=range(16),
                group_size=4,
                sampling=Sampling(max_tokens=48),
                max_concurrent=32,
                on_episode=on_episode,
            )
        )

    with caplog.at_level(logging.WARNING, "llm_gym"):
        thread = threading.Thread(target=play)
        thread.start()
        assert killed.wait(300)
        servers.replace(port)
        thread.join(500)
        assert not thread.is_alive()
    assert [e.seed for e in episodes] == [s for s in range(16) for _ in range(4)]
    assert [e.member for e in episodes] == list(range(4)) * 16
    assert all(not e.stop_reason.failed for e in episodes), [e.error for e in episodes if e.error]
    assert len(ended) == 64
    assert worst(other, episodes) <= 1e-4
    assert all((of == 5).all() for _, of in gaps(other, episodes))
    for episode in episodes:  # the ledger adds up: what was sampled is what the next context contains, once
        for turn, following in zip(episode.turns, episode.turns[1:], strict=False):
            whole = np.concatenate([turn.prompt, turn.completion.tokens])
            assert np.array_equal(following.prompt[: len(whole)], whole)
    said = caplog.text
    assert f"lost {first}" in said
    assert f"{first} is back" in said
    assert "weights of version 5 sent again" in said
    assert int(re.findall(r"(\d+) requests repeated", said)[0]) >= 1
    policy.close()


def test_two_servers_share_the_work_of_an_adapter(servers: Servers, first: str, caplog) -> None:
    """The second server joins with other weights, and goes away in the middle."""
    second = servers.start()
    second.wait()
    policy = ServerPolicy(servers=[first, second.url], retry_seconds=600)
    merged, tensors, config = adapted(7)
    policy.load(moved(8).state_dict().items(), version=1)
    policy.load(load_model(None).state_dict().items(), version=2)
    policy.load_adapter(tensors.items(), config, version=3)
    assert policy.differing(checksums(tensors.items(), policy.dtype)) == []
    prompts, killed = contexts(32), threading.Event()
    busy: list[int] = []
    before = metric(second.url, GENERATED)

    async def with_kill() -> Asked:
        asked = asyncio.create_task(ask_on(policy, prompts, killed))
        while sum(server.load for server in policy.servers) < len(prompts):
            await asyncio.sleep(0.01)
        busy.extend(server.load for server in policy.servers)
        while metric(second.url, GENERATED) < before + 16:  # a sum: it cannot have been and gone
            await asyncio.sleep(0.01)
        second.kill()
        killed.set()
        return await asked

    with caplog.at_level(logging.WARNING, "llm_gym"):
        of_each, completions = asyncio.run(with_kill())
        assert min(busy) >= 12  # shared evenly, for nothing was cached yet
        assert worst(merged, played(of_each, completions)) <= 1e-4
        assert {c.version for c in completions} == {3}
    assert f"lost {second.url}" in caplog.text
    policy.close()


def test_a_server_whose_command_is_killed_ends_with_it_and_is_named(servers: Servers, first: str) -> None:
    """No handler of `llmgym serve` runs then: the kernel tells the server, and the server its engine.

    The last test here: nothing starts it again.
    """
    command = servers.replace(int(first.rpartition(":")[2]))
    policy = ServerPolicy(servers=[first], start_seconds=600, retry_seconds=3)
    started = family(command.pid)
    assert len(started) >= 2
    command.kill()
    command.wait()
    assert within(240, lambda: not living(started)), living(started)
    with pytest.raises(PolicyError, match=f"No server for 3 s: .*{first}"):
        policy.generate(contexts(1), Sampling(max_tokens=4))
    policy.close()


def serve(*args: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """`llmgym serve` as a process of its own; its standard error is merged into the output."""
    command = [sys.executable, "-m", "llm_gym.cli", "serve", *args]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, text=True)


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def engines(pid: int) -> list[psutil.Process]:
    found = []
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # vLLM asks small programs about the machine
            if "EngineCore" in " ".join(process.cmdline() or [process.name()]):
                found.append(process)
    return found


@pytest.mark.soak
def test_ctrl_c_while_starting_leaves_no_process() -> None:
    command = serve("--port", "0", "--set", "max_model_len=128")
    while not engines(command.pid):
        assert command.poll() is None, command.stdout.read()
        time.sleep(0.05)
    started = family(command.pid)
    command.send_signal(signal.SIGINT)
    assert command.wait(240) == 130
    assert within(60, lambda: not living(started)), living(started)
    assert "Traceback" not in command.stdout.read()


def test_a_server_that_cannot_start_says_why_in_one_sentence() -> None:
    command = serve("--port", "0", "--set", "max_model_len=128", "--set", "max_num_batched_tokens=4")
    said = command.stdout.read().splitlines()
    assert command.wait() == 2
    assert said[-1].startswith("Error: the vLLM server ended while starting: ")
    assert "max_num_batched_tokens (4)" in said[-1]
