"""Engines, players and learners as actors of a Ray cluster; some of them are killed with -9."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_runs import pids, sampled

from llm_gym.errors import SettingError
from llm_gym.harness import TrainConfig, Trainer
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.runs.run_folder import RunFolder

pytestmark = pytest.mark.heavy

STEPS = 12
SMALL: dict[str, Any] = {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "eval": {"episodes": 0}}
SETS = ["prompts_per_step=4", "group_size=4", "eval.episodes=0"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie in it, and their paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)  # Ray keeps the first token that a process has read
def address(home: Path) -> Iterator[str]:
    """A cluster that runs already, with a token of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "token").write_text("a" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        options = ["--num-cpus=8", "--object-store-memory=300000000", "--include-dashboard=false", f"--port={port}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        here = ["--head", "--node-ip-address=127.0.0.1", f"--temp-dir={home}/s"]
        subprocess.run([*ray, "start", *here, *options], check=True, capture_output=True)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            for process in psutil.process_iter(["cmdline"]):
                if str(home) in " ".join(process.info["cmdline"] or []):
                    process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in this process, without a cluster."""
    out = tmp_path_factory.mktemp("alone") / "run"
    Trainer(TrainConfig(**SMALL), out=out, observer=object()).train()
    return out


def versions(run: Path, step: int) -> set[int]:
    episodes = RunFolder(run).read_episodes(f"step_{step:06d}")
    return {int(v) for e in episodes for turn in e.turns for v in turn.completion.versions}


def llmgym(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "llm_gym.cli", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def until(process: subprocess.Popen[str], word: str) -> str:
    """What it says up to that word."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(said)


def rest(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


def killed_in(out: Path, *titles: str, sets: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """The rows of a run of which such actors were killed in the second step, or soon after."""
    more = [word for each in [*sets, *SETS] for word in ("--set", each)]
    run = llmgym("train", "--cluster", "ray", "--steps", str(steps), "--out", str(out), *more)
    until(run, "step 1/")
    for title in titles:
        os.kill(pids(title)[0], signal.SIGKILL)
    said = rest(run)
    assert run.wait() == 0, said
    assert ("an engine has died" in said) == ("EngineActor" in titles), said
    return RunFolder(out).metrics()


def test_a_killed_engine_and_a_killed_player_change_no_token(address: str, alone: Path, tmp_path: Path) -> None:
    """One of each: what comes next must wait for those that are started again, and is sampled and played by them."""
    out, cluster = tmp_path / "run", [f"cluster.address={address}", "cluster.engines=1", "cluster.players=1"]
    rows = killed_in(out, "EngineActor", "PlayerActor", sets=cluster, steps=STEPS)
    assert sampled(out) == sampled(alone)
    assert [versions(out, step) for step in range(1, STEPS + 1)] == [{step} for step in range(STEPS)]
    assert all(row["sync/canary_gap_max"] < 1e-4 for row in rows if row["step"])
    assert [step.differences for step in replay(out, 2)] == [(), ()], "without a cluster"
    assert not pids("EngineActor"), "close ends the actors"


def test_vllm_engines_go_on_when_one_is_killed(address: str, tmp_path: Path) -> None:
    engine = ["policy.engine=vllm", f"policy.vllm.kv_cache_memory_bytes={1 << 28}"]
    cluster = [f"cluster.address={address}", "cluster.engines=2", "cluster.players=1"]
    rows = killed_in(tmp_path / "run", "EngineActor", sets=[*engine, *cluster], steps=6)
    assert [versions(tmp_path / "run", step) for step in range(1, 7)] == [{step} for step in range(6)]
    assert all(row["sync/canary_gap_max"] < 1e-3 and row["episode/failed_fraction"] == 0 for row in rows if row["step"])


RUN = ["train", "--cluster", "ray", "--nproc", "2", "--set", "eval.episodes=0", "--set", "prompts_per_step=4"]


def test_sigterm_leaves_nothing_and_a_killed_rank_is_named(address: str, tmp_path: Path) -> None:
    """First on a cluster that the command starts itself; the run goes on with another number of ranks."""
    out = str(tmp_path / "run")
    run = llmgym(*RUN, "--steps", "500", "--out", out, "--set", "cluster.players=1", "--set", "checkpoint.every=1")
    until(run, "/500: reward")
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) > 4
    run.send_signal(signal.SIGTERM)
    assert f"llmgym train --resume --out {out}" in rest(run)
    assert run.wait() == 130
    assert not psutil.wait_procs(children, timeout=60)[1]

    joined = ["--set", f"cluster.address={address}"]
    run = llmgym(*RUN, *joined, "--resume", "--out", out)
    until(run, "/500: reward")
    (victim,) = pids("RankActor.train")
    os.kill(victim, signal.SIGKILL)
    said = rest(run)
    assert run.wait() == 2, said
    assert re.search(r"rank 1 (is gone|has left)", said), said
    assert "Traceback" not in said

    steps = len(RunFolder(out).metrics())
    run = llmgym("train", "--cluster", "ray", *joined, "--resume", "--out", out, "--set", f"steps={steps + 2}")
    said = rest(run)
    assert run.wait() == 0, said


def test_a_machine_without_the_token_is_told(address: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN_PATH"}
    environment["HOME"] = str(tmp_path)
    run = llmgym("train", "--cluster", "ray", "--set", f"cluster.address={address}", env=environment, cwd=tmp_path)
    said = rest(run)
    assert run.wait() == 2
    assert f"cluster.address: '{address}' does not let this machine in; it may have another token" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"engines": 2}, "cluster.engines: got 2, but cluster.backend is None"),
        (
            {"backend": "ray", "address": "127.0.0.1:1"},
            "cluster.address: got '127.0.0.1:1', want auto or HOST:PORT",
        ),
        ({"backend": "ray", "engines": 0}, "cluster.engines: got 0"),
    ],
)
def test_bad_settings(cluster: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=re.escape(words)):
        Trainer(TrainConfig(**SMALL, cluster=cluster), out=tmp_path / "run", observer=object()).train()


def test_too_few_processors_is_a_sentence(address: str, tmp_path: Path) -> None:
    sets = ["--set", f"cluster.address={address}", "--set", "cluster.engines=9"]
    run = llmgym("train", "--cluster", "ray", *sets, cwd=tmp_path)
    said = rest(run)
    assert run.wait() == 2, said
    assert "10 in all, and the cluster has 8" in said.splitlines()[-1]


def test_a_full_object_store_is_a_sentence() -> None:
    """In a process of its own, which may put nothing on a disk in place of the store."""
    script = """
import ray, torch
from llm_gym.policies.ray.weights import stored
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False,
         _system_config={"local_fs_capacity_threshold": 0.001})
try:
    stored([("w", torch.zeros(30_000_000))])
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = "PolicyError cluster: 114 MiB of weights found no room in Ray's object store nor on the disk behind it"
    assert said in done.stdout, done.stdout + done.stderr


@pytest.mark.soak
def test_actors_that_run_out_of_memory_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    """Ray kills them when the machine has too little left; here, more than nothing is too much."""
    environment = os.environ | {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    run = llmgym("train", "--cluster", "ray", env=environment, cwd=tmp_path)
    said = rest(run)
    assert run.wait() == 2, said
    assert "Traceback" not in said
    assert "memory" in said.splitlines()[-1], said


def test_a_run_that_cannot_begin_leaves_the_cluster(address: str, tmp_path: Path) -> None:
    """So that the next one in the same process may join another."""
    script = f"""
import ray
from llm_gym.errors import SyncError
from llm_gym.harness import TrainConfig, Trainer
cluster, policy = {{"backend": "ray", "address": "{address}"}}, {{"canary_limit": 1e-30, "sync": "copy"}}
try:
    Trainer(TrainConfig(cluster=cluster, policy=policy), out="{tmp_path}/run", observer=object())
except SyncError:
    print("in it:", ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "in it: False" in done.stdout, done.stdout + done.stderr
