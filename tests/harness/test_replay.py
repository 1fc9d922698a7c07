"""Replay: saved episodes alone give the run's metrics and weights again, to the last bit; and say where they do not."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm_gym.cli.group import llmgym
from llm_gym.core import Completion, Episode, StopReason, Turn
from llm_gym.env import Reply, TextEnv
from llm_gym.episode_files import decode, encode
from llm_gym.errors import CheckpointError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.learner.weights import read_tensors
from llm_gym.harness.loops import group_player
from llm_gym.harness.loops.replay import compare_metrics, compare_tensors, replay, starting_point
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.trajectories import trajectories


class Letters(TextEnv):
    """Two turns, a reward for each: the share of letters e, and a draw from a global generator."""

    def open(self):
        self.said = 0
        return [{"role": "user", "content": f"Say {self.np_random.integers(10, 99)}."}]

    def reply(self, text: str) -> Reply:
        self.said += 1
        reward = {"e": text.count("e") / (1 + len(text)), "luck": torch.rand(()).item() / 10}
        return Reply([{"role": "user", "content": "And?"}], reward=reward, done=self.said == 2)


if "test/Letters-v0" not in gymnasium.registry:
    gymnasium.register("test/Letters-v0", entry_point=Letters)


def noisy(streams, config):
    """A loss that draws random numbers, as a user's may."""
    return -(1 + 0.1 * torch.rand_like(streams.logprobs)) * streams.advantages * streams.logprobs, {}


SMALL = ["eval.episodes=2", "prompts_per_step=2", "group_size=4", "sampling.max_tokens=8", "checkpoint.every=2"]
VARIANTS = {
    "plain": ["checkpoint.keep=9"],
    "several_updates": [
        *("minibatches=2", "epochs=2", "loss.correction.name=tis", "loss.kl=k2", "loss.kl_weight=0.1"),
        "checkpoint.keep_best=true",
    ],
    "adapters_and_own_loss": ["lora.rank=4", "optimizer.lr=0.01", f"loss.name={__name__}:noisy", "checkpoint.keep=1"],
}


def trained(out: Path, *sets: str) -> Path:
    rows = Trainer(load(TrainConfig, env="test/Letters-v0", sets=[*SMALL, *sets], steps=4), out=out).train()
    assert all(row["policy/grad_norm"] > 0 for row in rows[1:])
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "plain", *VARIANTS["plain"])


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_comes_out_the_same_from_the_start_and_from_a_checkpoint(
    plain: Path, tmp_path: Path, variant: str
) -> None:
    run = plain if variant == "plain" else trained(tmp_path / "whole", *VARIANTS[variant])
    from_the_start = tmp_path / "run"
    shutil.copytree(run, from_the_start, ignore=shutil.ignore_patterns("step_000002", "step_000004"))
    torch.manual_seed(12345)  # whatever the process has drawn before
    for folder, step, steps in ((run, 4, 4), (from_the_start, 3, 3), (from_the_start, 1, 1)):
        start, _ = starting_point(RunFolder(folder), step)
        done = list(replay(folder, step))
        assert [r.step for r in done] == list(range(start + 1, steps + 1))
        assert all(r.metrics >= 6 for r in done)
        assert [r.differences for r in done] == [()] * len(done)
    last = list(replay(run, 4))[-1]
    assert last.tensors >= 3 * len(read_tensors(run / "checkpoints" / "step_000004")), "weights and both moments"


def test_nothing_is_played_and_the_run_folder_is_left_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Sync", "Drivers", "Evaluation"):
        monkeypatch.setattr(group_player, name, lambda *a, **k: pytest.fail("an engine or an environment was started"))
    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    assert [r.step for r in replay(copy, 2)] == [1, 2]
    assert {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before


def test_a_mixture_with_left_over_groups_comes_out_the_same(tmp_path: Path) -> None:
    """Groups that were played too many, by older weights, are trained on where the run trained on them."""
    sets = [*SMALL, "envs=[{env: test/Letters-v0}, {env: Arithmetic-v0, weight: 2}]", "oversample.max_factor=2"]
    sets.append("filters.spread=0.01")
    rows = Trainer(load(TrainConfig, sets=sets, steps=3), out=tmp_path / "run").train()
    done = list(replay(tmp_path / "run", 3))
    assert [r.differences for r in done] == [()] * len(done)
    assert all(r.metrics >= 6 for r in done)
    assert {row["step"] for row in rows} == {0, 1, 2, 3}


def test_one_bit_of_one_log_probability_is_seen(copy: Path) -> None:
    file = copy / "episodes" / "step_000002.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    first = decode(lines[0])
    logprobs = first.trajectories[0].logprobs
    logprobs[0] = np.nextafter(logprobs[0], np.float32(-100))
    lines[0] = encode(first)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = replay(copy, 2)
    assert not first.differences
    assert "sampler/logprob_gap_mean" in {d.name for d in second.differences}


def test_a_checkpoint_that_is_not_this_run_is_named_by_tensor(copy: Path) -> None:
    file = copy / "checkpoints" / "step_000002" / "model.safetensors"
    weights = load_file(file)
    name = max(weights, key=lambda n: weights[n].numel())
    weights[name].view(-1)[5] += 0.5
    save_file(weights, file, {"format": "pt"})
    (found,) = list(replay(copy, 2))[-1].differences
    assert found.name == f"weights: {name}"
    assert found.said == f"1 of {weights[name].numel():,} values differ, at most by 0.5"
    done = CliRunner().invoke(llmgym, ["replay", str(copy), "--step", "2"])
    assert done.exit_code == 1, done.output
    assert re.search(r"step 2: 0 of \d+ metrics and 1 of \d+ tensors differ", done.stdout)
    assert f"  weights: {name}: 1 of" in done.stdout


def test_the_command(copy: Path, tmp_path: Path) -> None:
    words = ["replay", str(copy), "--step", "3", "--out", str(tmp_path / "model")]
    done = CliRunner().invoke(llmgym, words)
    assert done.exit_code == 0, done.output
    assert f"from {copy / 'checkpoints' / 'step_000002'}: step 3 to 3" in done.stdout
    assert "metrics are equal to the last bit" in done.stdout
    assert (tmp_path / "model" / "model.safetensors").is_file()
    changed = CliRunner().invoke(llmgym, ["replay", str(copy), "--step", "3", "--set", "advantage=dr_grpo"])
    assert changed.exit_code == 1, "another advantage is another gradient"
    assert "policy/grad_norm: recorded " in changed.stdout
    for more, said in (
        (["--step", "5"], "holds the episodes of steps 1 to 4"),
        (["--step", "2", "--from", str(copy / "checkpoints" / "step_000002")], "before step 2"),
        (["--step", "2", "--set", "advantag=x"], "advantage"),
    ):
        refused = CliRunner().invoke(llmgym, ["replay", str(copy), *more])
        assert refused.exit_code not in (0, 1)
        assert said in refused.output


def test_episodes_missing_in_between(copy: Path) -> None:
    (copy / "episodes" / "step_000003.jsonl").unlink()
    shutil.rmtree(copy / "checkpoints" / "step_000004")
    assert starting_point(RunFolder(copy), 2) == (0, None)
    with pytest.raises(CheckpointError, match="step: 4 builds on step 3"):
        starting_point(RunFolder(copy), 4)


def test_rollout_only_then_replay_is_the_first_step_of_a_run(tmp_path: Path) -> None:
    """The first step's episodes are those of a training run, and training on them gives its first step."""
    sets = [word for s in (*SMALL, "eval.episodes=0", "checkpoint.every=1") for word in ("--set", s)]
    common = ["train", "--steps", "2", "--seed", "5", *sets]
    done = CliRunner().invoke(llmgym, [*common, "--out", str(tmp_path / "played"), "--rollout-only"])
    assert done.exit_code == 0, done.output
    assert f"llmgym replay {tmp_path / 'played'} --step 2" in done.stdout
    played = RunFolder(tmp_path / "played")
    assert [row["step"] for row in played.metrics()] == [1, 2]
    assert not played.checkpoints()
    assert all("policy/loss" not in row for row in played.metrics())
    trained = CliRunner().invoke(llmgym, [*common, "--out", str(tmp_path / "trained")])
    assert trained.exit_code == 0, trained.output
    words = ["replay", str(played.path), "--step", "1", "--out", str(tmp_path / "model")]
    again = CliRunner().invoke(llmgym, words)
    assert again.exit_code == 0, again.output
    assert "step 1: nothing recorded to compare with" in again.stdout
    ours = load_file(tmp_path / "model" / "model.safetensors")
    theirs = load_file(tmp_path / "trained" / "checkpoints" / "step_000001" / "model.safetensors")
    assert compare_tensors(theirs, ours) == (len(ours), ())
    refused = CliRunner().invoke(llmgym, [*common, "--out", str(tmp_path / "played"), "--rollout-only", "--resume"])
    assert "--rollout-only" in refused.output
    assert refused.exit_code == 2


def test_comparisons() -> None:
    nan = float("nan")
    row = {"policy/loss": 0.1, "policy/entropy": None, "policy/kl": None, "time/train": 1.0, "sampler/x": 2.0}
    count, found = compare_metrics(
        row, {"policy/loss": 0.1, "policy/entropy": nan, "policy/kl": 0.0, "time/train": 9.0}
    )
    assert count == 3
    assert [d.name for d in found] == ["policy/kl"]
    one, two = torch.zeros(3), torch.tensor([0.0, 0.0, 1e-3])
    count, found = compare_tensors({"a": one, "b": one, "c": one}, {"a": two, "b": one.double(), "d": one})
    assert count == 4
    assert [(d.name, d.said.split(",")[0]) for d in found] == [
        ("a", "1 of 3 values differ"), ("b", "recorded torch.float32 [3]"), ("c", "only recorded"), ("d", "only replayed"),
    ]  # fmt: skip


floats = st.floats(width=32, allow_nan=False)


@given(
    st.lists(floats, min_size=1, max_size=5), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**63)
)
def test_episodes_are_read_back_to_the_last_bit(logprobs: list[float], reward: float, seed: int) -> None:
    ids = np.arange(len(logprobs), dtype=np.int32)
    completion = Completion(ids, np.array(logprobs, np.float32), "stop", 3, ((1, 4),))
    told = Episode(
        "e", seed, trajectories((Turn(ids, completion, reward),)), StopReason.ANSWERED, {"a": reward}, member=2
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        run.start("")
        run.write_episodes("step_000001", [told])
        (read,) = run.read_episodes("step_000001")
    assert read.turns[0].completion.logprobs.tobytes() == completion.logprobs.tobytes()
    assert read.turns[0].completion.versions.tolist() == completion.versions.tolist()
    assert (read.reward, read.seed, read.member, read.rewards) == (reward, seed, 2, {"a": reward})
    assert read.turns[0].reward.hex() == reward.hex()
