"""Two processes with a vLLM engine each, or with a server between them: the run of one process, proven in both."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import ranks
import torch
from leftovers import existing, shared_memory
from safetensors.torch import load_file
from sandbox_tiers import within
from test_nproc import DEADLINE, begun, gone

from llm_gym.core import Episode
from llm_gym.episode_files import decode

pytestmark = pytest.mark.heavy
if importlib.util.find_spec("vllm") is None:  # to import it takes ten seconds
    pytest.skip("vLLM is not installed", allow_module_level=True)

__all__ = ["begun"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """One that starts while the first runs do without it."""
    from llm_gym.policies.vllm_server.process import ServerProcess

    settings = {"dtype": "float32", "max_model_len": 256, "enable_lora": True, "max_lora_rank": 8}
    with ServerProcess(settings=settings) as process:
        yield process.url


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, server: str) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("one")
    engines.train("server, ddp", folder, server)
    return folder / "server, ddp"


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: str) -> Path:
    """What two processes make: one run after another, so that groups and engines must end properly too."""
    folder = tmp_path_factory.mktemp("two")
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = dict.fromkeys(item.callspec.params["name"] for item in here if "name" in item.callspec.params)
    ranks.run(engines.__file__, [(2, [str(folder), server, *names])])
    return folder


def marked(names: Iterable[str]) -> list[Any]:
    """The names of runs, those that CI leaves out marked so."""
    return [pytest.param(name, marks=[pytest.mark.soak] if name in engines.SOAK else []) for name in names]


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]


@pytest.mark.parametrize("name", marked(engines.RUNS))
def test_every_synchronisation_is_proven_in_both(name: str, two: Path) -> None:
    """The gaps are the widest of any process; a proof that fails in one ends the run."""
    rows = rows_of(two / name)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sampler/logprob_gap_max"] <= 1e-4
        assert 0 <= row["sync/canary_gap_max"] <= 1e-4
        assert row["sampler/staleness_max"] == 0
    assert any(row["policy/grad_norm"] > 0 for row in rows)
    for rank in (0, 1):
        said = json.loads((two / name / f"rank-{rank}").read_text())
        assert said["version"] == 3
        assert said.get("cache", engines.CACHE) == engines.CACHE, "two engines fit on one machine"
    for step in (1, 2, 3):
        lines = (two / name / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()
        assert len(lines) == 24
        assert {span.version for line in lines for _, span in decode(json.loads(line)).spans} == {step - 1}


@pytest.mark.parametrize("name", marked(name for name in engines.RUNS if "lora" not in name))
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


def episodes_of(run: Path, step: int) -> list[Episode]:
    lines = (run / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [decode(json.loads(line)) for line in lines]


@pytest.mark.parametrize("name", engines.AHEAD)
def test_rollouts_go_on_in_both_while_they_train(name: str, two: Path, one: Path) -> None:
    """The tasks of one process that waits, each played where its number belongs, no token older than the bound."""
    rows = rows_of(two / name)
    assert [row["stream/ended"] for row in rows] == [3, 6, 9]
    assert [row["stream/staleness_max"] for row in rows] == [0, 1, 1]
    assert max(row["sync/canary_gap_max"] for row in rows) <= 1e-4
    for step in (1, 2, 3):
        ours, theirs = episodes_of(two / name, step), episodes_of(one, step)
        assert [(e.seed, e.member) for e in ours] == [(e.seed, e.member) for e in theirs]
        assert [e.rank for e in ours[::8]] == [number % 2 for number in range(3 * (step - 1), 3 * step)]
        assert {step - 1 - int(v) for e in ours for t in e.turns for v in t.completion.versions} <= {0, 1}


def test_an_engine_that_fails_in_one_process_ends_all_with_its_sentence(two: Path) -> None:
    """The other one is inside vLLM's start meanwhile, and does not wait for ever."""
    said = [(two / f"failed-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "Available memory" in said[0]


@pytest.mark.parametrize("how", [pytest.param("Ctrl-C", marks=pytest.mark.soak), "a killed rank"])
def test_nothing_is_left_behind(how: str, begun, request: pytest.FixtureRequest) -> None:
    """Of two processes with an engine each; and of two with a server, to which rank 0 hands weights over."""
    if how == "Ctrl-C":
        launcher, processes = begun("--policy", "vllm", "--set", "policy.vllm.max_model_len=256")
    else:
        address = f"policy.servers=[{request.getfixturevalue('server')}]"
        launcher, processes = begun("--set", address, "--set", "policy.server.start_seconds=600")
    memory = shared_memory({process.pid for process in processes.values()})
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
        assert memory
        assert "Error: rank 1 was killed by SIGKILL; the other processes were stopped." in said
    assert gone(processes)
    assert within(60, lambda: not existing(memory)), existing(memory)
