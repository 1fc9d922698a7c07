"""Two processes with a vLLM engine each, or with a server between them: the run of one process, proven in both."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import psutil
import pytest
import ranks
import torch
from safetensors.torch import load_file
from test_interrupt import shared_memory
from test_nproc import DEADLINE, begun, gone

from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, load

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

__all__ = ["begun"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from llm_gym.policies.serving import ServerProcess

    settings = {"dtype": "float32", "max_model_len": 256, "enable_lora": True, "max_lora_rank": 8}
    with ServerProcess(settings=settings) as process:
        process.wait()
        yield process.url


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    run = engines.train("vllm, ddp", tmp_path_factory.mktemp("one"))
    assert run.policy._thread.engine.vllm_config.cache_config.kv_cache_memory_bytes == engines.CACHE
    return run.run.path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, server: str) -> Path:
    """What two processes make: one run after another, so that groups and engines must end properly too."""
    folder = tmp_path_factory.mktemp("two")
    ranks.run([sys.executable, engines.__file__, str(folder), server, *engines.RUNS], 2)
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]


@pytest.mark.parametrize("name", engines.RUNS)
def test_every_synchronisation_is_proven_in_both(name: str, two: Path) -> None:
    """The gaps are the widest of any process; a proof that fails in one ends the run."""
    rows = rows_of(two / name)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sampler/logprob_gap_max"] <= 1e-4
        assert 0 <= row["sync/canary_gap_max"] <= 1e-4
        assert row["sampler/staleness_max"] == 0
    assert any(row["policy/grad_norm"] > 0 for row in rows)
    assert [(two / name / f"version-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    for step in (1, 2, 3):
        lines = (two / name / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()
        assert len(lines) == 24
        assert {turn["version"] for line in lines for turn in json.loads(line)["turns"]} == {step - 1}


@pytest.mark.parametrize("name", [name for name in engines.RUNS if "lora" not in name])
def test_it_is_the_run_of_one_process(name: str, two: Path, one: Path) -> None:
    """The same episodes, gradients and weights up to rounding, whoever sampled and whoever sent the weights."""
    for ours, theirs in zip(rows_of(two / name), rows_of(one), strict=True):
        for metric in ("reward/mean", "tokens/generated", "tokens/trained"):
            assert ours[metric] == theirs[metric]
        assert ours["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=1e-3)
    last = Path("checkpoints") / "step_000003" / "model.safetensors"
    want = load_file(one / last)
    for tensor, value in load_file(two / name / last).items():
        torch.testing.assert_close(value, want[tensor], rtol=0, atol=1e-5)


def test_an_engine_of_several_devices_is_refused() -> None:
    """Before a model is loaded: the processes of such an engine would have to sample the same episodes."""
    from llm_gym.harness.parallel import World
    from llm_gym.harness.sync import check

    for name, value in (("tensor_parallel_size", 2), ("distributed_executor_backend", "mp")):
        config = load(TrainConfig, policy={"engine": "vllm", "vllm": {name: value}})
        with pytest.raises(
            ConfigError, match=rf"policy.vllm.{name}: got {value!r}, but each of 2 processes .* servers"
        ):
            check(config, World(0, 2))
        check(config)
    check(load(TrainConfig, policy={"engine": "vllm", "vllm": {"tensor_parallel_size": 1}}), World(0, 2))


@pytest.mark.parametrize("how", ["Ctrl-C", "a killed rank"])
def test_nothing_is_left_behind(how: str, begun) -> None:
    launcher, processes = begun("--policy", "vllm", "--set", "policy.vllm.max_model_len=256")
    memory = shared_memory(set(map(int, [p.pid for p in processes.values()])))
    if how == "Ctrl-C":
        launcher.send_signal(signal.SIGINT)
    else:
        processes[1].send_signal(signal.SIGKILL)
    _, said = launcher.communicate(timeout=DEADLINE)
    assert "Traceback" not in said
    if how == "Ctrl-C":
        assert launcher.returncode == 130
        assert said.count("Stopped after step") == 1
    else:
        assert launcher.returncode == 2
        assert "Error: rank 1 was killed by SIGKILL; the other processes were stopped." in said
    assert gone(processes)
    assert not [file for file in memory if Path(file).exists()]


def test_an_engine_that_fails_in_one_process_ends_all_with_its_sentence(tmp_path: Path) -> None:
    """Rank 1 has no room for its cache; rank 0 is inside vLLM's start meanwhile, and does not wait for ever."""
    command = [sys.executable, "-m", "llm_gym.cli", "train", "--policy", "vllm", "--out", str(tmp_path / "run")]
    only = "import os, sys; os.environ['VLLM_CPU_KVCACHE_SPACE'] = '1' if os.environ['RANK'] == '0' else '100000'; "
    program = [sys.executable, "-c", only + f"os.execv(sys.executable, {command!r})"]
    both = ranks.start(program, 2, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = [process.communicate(timeout=DEADLINE)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, text in zip(both, said, strict=True):
        assert process.returncode == 2, text
        assert "Available memory" in text.splitlines()[-1], text
        assert not psutil.pid_exists(process.pid)
