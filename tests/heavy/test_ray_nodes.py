"""Two Ray nodes in network namespaces of their own, and a run whose actors are killed ten times."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_runs import pids, sampled

from llm_gym.harness import TrainConfig, Trainer

pytestmark = [pytest.mark.heavy, pytest.mark.soak, pytest.mark.where_allowed, pytest.mark.timeout(1200)]

SETTINGS = {"prompts_per_step": 4, "group_size": 4}
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--object-store-memory=200000000"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie in it, and their paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def nodes(short: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What runs a command on the head, a machine with room for one process; the other machine has room for five."""
    names, wires = (f"gyma{os.getpid()}", f"gymb{os.getpid()}"), (f"a{os.getpid()}", f"b{os.getpid()}")
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {getattr(error, 'stderr', error)}")
    (short / "token").write_text("b" * 64)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(short / "token")}
    try:
        ip("netns", "add", names[1])
        ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for i, (name, wire) in enumerate(zip(names, wires, strict=True), 1):
            ip("link", "set", wire, "netns", name)
            ip("-n", name, "addr", "add", f"10.78.0.{i}/24", "dev", wire)
            ip("-n", name, "link", "set", wire, "up")
            ip("-n", name, "link", "set", "lo", "up")
        on = [["ip", "netns", "exec", name] for name in names]
        parts = [["--head", "--port=6399", "--include-dashboard=false", "--num-cpus=1"], ["--address=10.78.0.1:6399"]]
        for i, part in enumerate(parts, 1):
            more = [*part, f"--node-ip-address=10.78.0.{i}", f"--temp-dir={short}/{i}", *["--num-cpus=5"] * (i - 1)]
            subprocess.run([*on[i - 1], *RAY, *more], check=True, capture_output=True, env=environment)
        yield on[0], environment
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(short) in " ".join(process.info["cmdline"] or []):
                process.kill()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def alone(out: Path, steps: int) -> Path:
    config = TrainConfig(steps=steps, **SETTINGS, eval={"episodes": 0})  # type: ignore[arg-type]
    Trainer(config, out=out, observer=object()).train()
    return out


def command(out: Path, steps: int, *more: str) -> list[str]:
    sets = [f"{name}={value}" for name, value in SETTINGS.items()]
    sets += ["eval.episodes=0", "cluster.engines=2", "cluster.players=2", *more]
    line = [sys.executable, "-m", "llm_gym.cli", "train", "--cluster", "ray", "--out", str(out), "--steps", str(steps)]
    return [*line, *(word for each in sets for word in ("--set", each))]


def rows(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def kill_one(title: str) -> None:
    """Kills an actor of that kind, waiting for one that was killed before to be back."""
    while not (found := pids(title)):
        time.sleep(0.1)
    os.kill(random.choice(found), signal.SIGKILL)


def test_two_nodes_and_two_learners(nodes: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    """Everything crosses the wire: weights, groups, gradients. An engine and a player are killed."""
    on, environment = nodes
    out = tmp_path / "run"
    line = [*on, *command(out, 6, "cluster.address=10.78.0.1:6399"), "--nproc", "2"]
    with subprocess.Popen(line, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True) as run:
        while rows(out) < 2 and run.poll() is None:
            time.sleep(0.01)
        for title in ("EngineActor", "PlayerActor"):
            kill_one(title)
        assert run.stdout is not None
        said = run.stdout.read()
    assert run.returncode == 0, said
    assert sampled(out) == sampled(alone(tmp_path / "alone", 6))


def test_ten_kills_change_no_token(tmp_path: Path) -> None:
    out, steps = tmp_path / "run", 60
    with subprocess.Popen(command(out, steps), stdout=-1, stderr=subprocess.STDOUT, text=True) as run:
        for number in range(10):
            while rows(out) < 2 + 5 * number and run.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.3))
            kill_one(("EngineActor", "PlayerActor")[number % 2])
        assert run.stdout is not None
        said = run.stdout.read()
    assert run.returncode == 0, said
    assert sampled(out) == sampled(alone(tmp_path / "alone", steps))
