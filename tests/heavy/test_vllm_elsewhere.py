"""A real vLLM server on what is another machine to the trainer: a network and a shared memory of its own.

One server, started once by `llmgym serve --host`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, Trainer, load

pytestmark = [pytest.mark.heavy, pytest.mark.where_allowed]
pytest.importorskip("vllm", reason="vLLM is not installed")

SECRET = "s3cret"
FEW = ["prompts_per_step=4", "group_size=4", "eval.episodes=0", "checkpoint.every=0", "optimizer.lr=1e-3", "steps=2"]
SERVE = ["--port", "8000", "--set", "max_model_len=256", "--set", "enable_lora=true", "--set", "max_lora_rank=8"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[str, str]]:
    """A network namespace joined to ours by one wire, and its address there."""
    name = f"gym{os.getpid()}"
    inside, outside = f"a{os.getpid()}", f"b{os.getpid()}"
    octet = os.getpid() % 250 + 1
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {getattr(error, 'stderr', error)}")
    with contextlib.ExitStack() as stack:
        stack.callback(ip, "netns", "delete", name)
        try:
            ip("link", "add", inside, "type", "veth", "peer", "name", outside)
            stack.callback(ip, "link", "delete", outside)  # the other end goes with it
            ip("link", "set", inside, "netns", name)
            ip("addr", "add", f"10.77.{octet}.1/30", "dev", outside)
            ip("link", "set", outside, "up")
            ip("-n", name, "addr", "add", f"10.77.{octet}.2/30", "dev", inside)
            ip("-n", name, "link", "set", inside, "up")
            ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two network namespaces cannot be joined here: {error.stderr}")
        yield name, f"10.77.{octet}.2"


@pytest.fixture(scope="module")
def server(network: tuple[str, str]) -> Iterator[str]:
    name, address = network
    own_memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    away = ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", own_memory, "sh"]
    serve = [sys.executable, "-m", "llm_gym.cli", "serve", "--host", "0.0.0.0", *SERVE]
    environment = os.environ | {"LLM_GYM_TOKEN": SECRET}
    with subprocess.Popen([*away, *serve], env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        heard = []
        for line in process.stdout:
            heard.append(line)
            if line.startswith("serving on"):
                break
        else:
            pytest.fail("".join(heard))
        yield f"http://{address}:8000"
        process.terminate()
        process.stdout.read()


def trained(server: str, out: Path, *sets: str, **given: Any) -> list[dict[str, Any]]:
    config = load(TrainConfig, sets=[*FEW, *sets], policy={"servers": [server], "server": {"token": SECRET}}, **given)
    Trainer(config, out=out).train()
    assert SECRET not in (out / "config.yaml").read_text()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("token", ["wrong", ""])
def test_a_wrong_token_is_one_sentence(server: str, tmp_path: Path, token: str) -> None:
    config = load(TrainConfig, sets=FEW, policy={"servers": [server], "server": {"token": token}})
    with pytest.raises(ConfigError, match=r"token: .* answered 401: .*LLM_GYM_TOKEN"):
        Trainer(config, out=tmp_path / "run").train()


@pytest.mark.parametrize(("mode", "rank"), [("file", 0), ("adapter", 4), ("merged", 4), ("disk", 0)])
def test_it_gets_its_weights_and_they_are_proven(server: str, tmp_path: Path, mode: str, rank: int) -> None:
    """Each tensor by its checksum, each token of the training by the learner's log-probability."""
    lora = {"rank": rank} if rank else None
    rows = trained(server, tmp_path / "run", f"policy.sync={mode}", lora=lora)
    steps = [row for row in rows if row["step"]]
    assert len(steps) == 2
    for row in steps:
        assert row["sync/mode"] == mode
        assert row["sync/canary_gap_max"] <= 1e-4
        assert row["sampler/logprob_gap_max"] <= 1e-4
        assert 0 < row["sync/transfer"] + row["sync/pause"] <= row["time/sync"]
    assert any(row["policy/grad_norm"] > 0 for row in steps)


def test_nothing_was_handed_over_by_a_path(server: str, network: tuple[str, str]) -> None:
    """Its shared memory is its own, and empty again."""
    name, _ = network
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
    seen = [Path("/proc", pid, "root", "dev", "shm") for pid in pids]
    assert seen
    for there in seen:
        assert not there.samefile("/dev/shm")
        assert [path for path in there.rglob("*") if path.suffix in (".safetensors", ".part", ".json")] == []
