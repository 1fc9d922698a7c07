"""Fine-tuning, distillation, replay and stages by several processes: what one process does, up to rounding."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import loop_ranks
import pytest
import ranks
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from test_teacher import Server

from llm_gym.cli.group import llmgym
from llm_gym.harness.loops.replay import compare_tensors, processes_of, replay
from llm_gym.harness.loops.sft import sft
from llm_gym.harness.runs.run_folder import RunFolder

pytestmark = pytest.mark.heavy
LLMGYM = [sys.executable, "-m", "llm_gym.cli"]
STRATEGIES = [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"]
"""CI has the one in which processes have more to do for each other; test_ranks.py compares the gradients of both."""
LOOPS = ("tuned", "begun", "ended", "commanded", "distilled", "played", "staged")
SEVERAL = ("ended", "commanded")
"""What only several do."""


class Found:
    """Folders of one process, of two and of three, and what the functions of each returned, with each strategy."""

    def __init__(self, base: Path, strategies: Sequence[str]) -> None:
        self.strategies = strategies
        self.folders = {size: base / str(size) for size in (1, 2, 3)}
        self.returned: dict[int, list[dict[Any, Any]]] = {}
        self.requests: dict[int, int] = {}
        for folder in self.folders.values():
            folder.mkdir()
            loop_ranks.data(folder)
        loop_ranks.teacher(self.folders[1])
        shutil.copytree(self.folders[1] / "teacher", self.folders[2] / "teacher")

    def alone(self, server: Server) -> None:
        """What one process does: the other halves too."""
        folder = self.folders[1]
        (folder / "teacher_url").write_text(server.url)
        self.returned[1] = [{name: getattr(loop_ranks, name)(folder, "ddp") for name in LOOPS if name not in SEVERAL}]
        self.requests[1] = server.asked
        for strategy in self.strategies:
            shutil.copytree(folder / "ddp-begun", self.folders[2] / f"{strategy}-ended")
        loop_ranks.sft(loop_ranks.half(folder, "ddp", "ddp-whole", 4), progress=False)

    def together(self, size: int, names: tuple[str, ...], server: Server) -> None:
        """What several ranks do."""
        folder, before = self.folders[size], server.asked
        (folder / "teacher_url").write_text(server.url)
        ranks.run(loop_ranks.__file__, [(size, [str(folder), ",".join(self.strategies), *names])])
        self.requests[size] = server.asked - before
        self.returned[size] = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Found:
    asked = [item.callspec.params for item in request.session.items if item.path == request.path and _varied(item)]
    strategies = sorted({"fsdp", *(params["strategy"] for params in asked if "strategy" in params)})
    made = Found(tmp_path_factory.mktemp("loops"), strategies)
    made.alone(server)
    made.together(2, LOOPS, server)
    if any(params.get("size") == 3 for params in asked):
        made.together(3, ("tuned",), server)
    return made


def _varied(item: pytest.Item) -> bool:
    return hasattr(item, "callspec")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    read: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return read


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], most: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=most, atol=most, msg=lambda m, n=name: f"{n}: {m}")


def stable(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in loop_ranks.rows_of(run)]


# Fine-tuning


@pytest.mark.parametrize("name", ["few", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_fine_tuning_has_the_gradient_of_one_process(found: Found, size: int, strategy: str, name: str) -> None:
    """In float64, in every step; and the same loss on held-out chats, which are dealt too."""
    one = found.returned[1][0]["tuned"][name]
    assert len(one["gradients"]) == 3
    assert max(float(g.abs().max()) for g in one["gradients"][0].values()) > 1e-4
    for rank in found.returned[size]:
        for ours, theirs in zip(rank["tuned", strategy][name]["gradients"], one["gradients"], strict=True):
            same(ours, theirs, 1e-9)
    run, alone = found.folders[size] / f"{strategy}-{name}", found.folders[1] / f"ddp-{name}"
    rows, wanted = stable(run), stable(alone)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3]
    for row, want in zip(rows, wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-9, abs=1e-9)
    same(weights(run / "model"), weights(alone / "model"), 1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("size", [3])
def test_a_rank_had_no_row(found: Found, size: int) -> None:
    passes = [rank["tuned", "fsdp"]["few"]["passes"] for rank in found.returned[size]]
    assert min(map(sum, passes)) == 0, "two rows a step, two held out"
    assert all(sum(each) > 0 for each in zip(*passes, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fine_tuning_goes_on_with_more_or_fewer_processes(found: Found, strategy: str, monkeypatch) -> None:
    whole = found.folders[1] / "ddp-whole"
    begun = found.folders[2] / f"{strategy}-begun"
    settings = loop_ranks.half(found.folders[2], strategy, begun.name, 4)
    written = yaml.safe_load((begun / "config.yaml").read_text())
    assert isinstance(written["token_budget"], int), "measured once, and written down"
    sft(settings, resume=True, progress=False)
    for run in (begun, found.folders[2] / f"{strategy}-ended"):
        for row, want in zip(stable(run), stable(whole), strict=True):
            assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-4)
        same(weights(run / "model"), weights(whole / "model"), 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_command_speaks_once(found: Found, strategy: str) -> None:
    said = [rank["commanded", strategy] for rank in found.returned[2]]
    assert said[0].count("Report:") == said[0].count("Model:") == 1
    assert said[1] == ""
    run = found.folders[2] / f"{strategy}-commanded"
    assert [row["step"] for row in loop_ranks.rows_of(run)] == [1, 2]
    assert (run / "report.html").is_file()
    assert (run / "model" / "model.safetensors").is_file()


# Distillation


@pytest.mark.parametrize("teacher", ["local", "served"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_distillation_is_that_of_one_process(found: Found, strategy: str, teacher: str) -> None:
    run, alone = found.folders[2] / f"{strategy}-{teacher}", found.folders[1] / f"ddp-{teacher}"
    rows, wanted = loop_ranks.rows_of(run)[1:], loop_ranks.rows_of(alone)[1:]
    for row, want in zip(rows, wanted, strict=True):
        assert row["tokens/trained"] == want["tokens/trained"]
        for name in ("distill/kl", "policy/grad_norm", "reward/mean"):
            assert row[name] == pytest.approx(want[name], rel=1e-3), name
    last = Path("checkpoints") / "step_000002"
    same(weights(run / last), weights(alone / last), 1e-5)


def test_rows_are_scored_once_whatever_the_number_of_ranks(found: Found) -> None:
    """Runs of two ranks against one run of one: greetings apart, and with FSDP passes that weigh nothing."""
    rows, greeting = found.requests[1] - 1, 1
    assert rows == 2 * 3 * 4
    runs = len(found.strategies)
    assert found.requests[2] >= runs * (rows + 2 * greeting)
    assert found.requests[2] <= runs * (rows + 2 * greeting) + 4


# Replay


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_replay_two_processes_to_the_last_bit(found: Found, strategy: str) -> None:
    for rank in found.returned[2]:
        for metrics, tensors, differences in rank["played", strategy]["again"]:
            assert (metrics >= 6, tensors >= 20, differences) == (True, True, ())
        assert rank["played", strategy]["from_start"] == [(0, ())]
    first = found.folders[2] / f"{strategy}-trained" / "checkpoints" / "step_000001"
    assert compare_tensors(weights(first), weights(found.folders[2] / f"{strategy}-model"))[1] == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_episodes_without_training_are_those_of_one_process(found: Found, strategy: str) -> None:
    """And those that the first step of a run plays."""
    run, alone = (RunFolder(found.folders[n] / f"{s}-played") for n, s in ((2, strategy), (1, "ddp")))
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert not run.checkpoints()
    for name in ("step_000001", "step_000002"):
        ours, theirs = run.read_episodes(name), alone.read_episodes(name)
        assert [e.seed for e in ours] == [e.seed for e in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert [t.completion.tokens.tolist() for t in a.turns] == [t.completion.tokens.tolist() for t in b.turns]
    trained = RunFolder(found.folders[2] / f"{strategy}-trained").read_episodes("step_000001")
    for a, b in zip(trained, run.read_episodes("step_000001"), strict=True):
        assert [t.completion.logprobs.tolist() for t in a.turns] == [t.completion.logprobs.tolist() for t in b.turns]


def test_one_process_can_replay_two_and_is_told_why_bits_differ(found: Found) -> None:
    run = found.folders[2] / "fsdp-trained"
    assert processes_of(RunFolder(run), 1) == 2
    (second,) = replay(run, 2)
    assert second.learned["policy/grad_norm"] == pytest.approx(loop_ranks.rows_of(run)[2]["policy/grad_norm"], rel=1e-3)
    said = CliRunner().invoke(llmgym, ["replay", str(run), "--step", "1"]).stdout
    assert "The run had 2 processes, this has 1: sums are rounded otherwise. For the same: --nproc 2" in said


def test_the_exit_code_of_two_processes_is_the_verdict(found: Found) -> None:
    run = found.folders[2] / "fsdp-trained"
    words = ["replay", str(run), "--step", "2", "--nproc", "2", "--set", "loss.entropy_weight=0.2"]
    done = subprocess.run([*LLMGYM, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout.count("step 2: ") == 1, "rank 0 alone speaks"
    assert "differ" in done.stdout
    assert "processes" not in done.stdout + done.stderr


# Stages


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stages_are_those_of_one_process(found: Found, strategy: str) -> None:
    ours, theirs = found.folders[2] / f"{strategy}-staged", found.folders[1] / "ddp-staged"
    for part in ("1-sft/model", "2-train/merged", "3-train/checkpoints/step_000001"):
        same(weights(ours / part), weights(theirs / part), 1e-5)
    starts = yaml.safe_load((ours / "3-train" / "provenance.yaml").read_text())
    assert [start["processes"] for start in starts] == [2]
