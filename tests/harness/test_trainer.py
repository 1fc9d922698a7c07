"""The loop: seeds, resume, evaluation on unseen problems, and mistakes found before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import pytest
import torch

from llm_gym.core import StopReason, group
from llm_gym.env import Reply, TextEnv
from llm_gym.errors import CheckpointError, SettingError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops import group_learner
from llm_gym.harness.loops.observer import Observer, listening
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.runs.run_folder import RunFolder


class Digits(TextEnv):
    """Rewards digits: any model earns a little of it, so every group has spread."""

    def open(self):
        return [{"role": "user", "content": f"Count to {self.np_random.integers(10, 99)}."}]

    def reply(self, text: str) -> Reply:
        return Reply(reward={"digits": sum(c.isdigit() for c in text) / (1 + len(text))}, done=True)


if "test/Digits-v0" not in gymnasium.registry:
    gymnasium.register("test/Digits-v0", entry_point=Digits)

SMALL = ["eval.episodes=4", "sampling.max_tokens=12", "prompts_per_step=2", "group_size=4", "checkpoint.every=2"]


def config(*sets: str, **given) -> TrainConfig:
    return load(TrainConfig, env="test/Digits-v0", sets=[*SMALL, *sets], **given)


def stable(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_second/"))} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


MORE = ("eval.k=2", "eval.every=1", "checkpoint.keep_best=true", "minibatches=2", "epochs=2", "checkpoint.keep=1")


class StopAfter(Observer):
    """Dies after some rows, as a kill would, but inside this process."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def on_row(self, row) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("died_at", "resumed_at", "extra"),
    [(2, 0, ()), (4, 2, ()), (6, 4, ("loss.kl=k2", "loss.kl_weight=0.1")), (4, 2, MORE)],
)
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, died_at: int, resumed_at: int, extra: tuple[str, ...]
) -> None:
    whole = Trainer(config(*extra, steps=5), out=tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(*extra, steps=5), out=tmp_path / "cut", observer=StopAfter(died_at)).train()
    again = Trainer(config(*extra, steps=5), out=tmp_path / "cut", resume=True)
    assert again.step == resumed_at
    assert stable(again.train()) == stable(whole)
    assert any(row.get("policy/grad_norm", 0) > 0 for row in whole)
    ends = [weights(tmp_path / run / "checkpoints" / "step_000005") for run in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    start = load_model(None).state_dict()
    assert any(not torch.equal(ends[0][name], start[name]) for name in start)
    kept = [sorted(f.resolve().name for f in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "cut")]
    assert kept[0] == kept[1], "the best one too, if the run keeps it"


def test_adapters_resume_too_and_leave_the_base_alone(tmp_path: Path) -> None:
    lora = ["lora.rank=4", "optimizer.lr=0.01"]
    whole = Trainer(config(*lora, steps=4), out=tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(*lora, steps=4), out=tmp_path / "cut", observer=StopAfter(4)).train()
    again = Trainer(config(*lora, steps=4), out=tmp_path / "cut", resume=True)
    assert again.step == 2
    assert stable(again.train()) == stable(whole)
    base = load_model(None).state_dict()
    trained = {k.replace(".base_layer", ""): v for k, v in again.model.get_base_model().state_dict().items()}
    assert all(torch.equal(base[name], trained[name]) for name in base)
    assert (tmp_path / "whole/checkpoints/step_000004/adapter_model.safetensors").exists()


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    one, two, other = (
        stable(Trainer(config(steps=2, seed=seed), out=tmp_path / name).train())
        for name, seed in (("one", 7), ("two", 7), ("other", 8))
    )
    assert one == two
    assert one != other
    assert one[0] == two[0]


def test_the_run_folder_tells_the_story(tmp_path: Path) -> None:
    rows = Trainer(config(steps=2), out=tmp_path / "run").train()
    folder = RunFolder(tmp_path / "run")
    assert folder.metrics() == rows
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/greedy_reward", "eval/sampled_reward"} <= rows[0].keys() & rows[-1].keys()
    assert load(TrainConfig, folder.config_file) == config(steps=2).resolved()
    episodes = (folder.path / "episodes" / "step_000001.jsonl").read_text().splitlines()
    assert len(episodes) == 8
    assert len({json.loads(line)["seed"] for line in episodes}) == 2
    gap = [row["sampler/logprob_gap_max"] for row in rows[1:]]
    assert max(gap) < 1e-4, gap


def test_a_seed_whose_group_failed_teaches_nothing(tmp_path: Path) -> None:
    run = Trainer(config(steps=1, seed=1), out=tmp_path / "run")
    episodes = run.collect().episodes
    broken = [dataclasses.replace(e, stop_reason=StopReason.ENV_ERROR) for e in episodes[:4]]
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    (batch,) = run.learning.batches(group([*broken, *episodes[4:]], 4))
    assert batch.episodes == 4
    assert batch.tokens == sum(e.tokens_generated for e in episodes[4:])
    run.learner.step(*run.learning.batches(group([*broken, *broken], 4)))
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    run.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"env": "Aritmetic-v0"}, "Arithmetic-v0"),
        ({"env_args": {"max_turn": 3}}, "max_turn"),
        ({"advantage": "group_nrom"}, "group_norm"),
        ({"policy": {"engine": "vlm"}}, "vllm"),
        ({"policy": {"sync": "shraed"}}, "shared"),
        ({"policy": {"engine": "vllm", "sync": "shared"}}, "valid: auto, tensors, disk, restart"),
        ({"policy": {"engine": "vllm", "sync": "tensors"}, "lora": {"rank": 4}}, "with adapters; valid: auto, adapter"),
        ({"policy": {"engine": "vllm", "vllm": {"dtype": "half"}}}, "policy.vllm.dtype"),
        ({"policy": {"engine": "vllm", "vllm": {"max_num_seq": 4}}}, "max_num_seqs"),
        ({"policy": {"engine": "server"}}, "policy.servers"),
        ({"policy": {"servers": ["localhost:8000"]}}, "want a URL"),
        ({"policy": {"servers": ["http://localhost:1"], "server": {"fodler": "x"}}}, "folder"),
        ({"policy": {"engine": "openai"}}, "cannot be given new weights"),
        ({"policy": {"engine": "vllm", "servers": ["http://localhost:1"]}}, "policy.servers"),
        ({"policy": {"sleep": True}}, "CUDA"),
        ({"model": "no/such/model/anywhere"}, "no/such/model/anywhere"),
    ],
)
def test_mistakes_are_found_before_the_model_loads(tmp_path: Path, monkeypatch, given, said) -> None:
    monkeypatch.setattr(group_learner, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SettingError, match=said):
        Trainer(load(TrainConfig, sets=SMALL, **given), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(config(steps=1), out=tmp_path / "run").train()
    with pytest.raises(CheckpointError, match="--resume"):
        Trainer(config(steps=1), out=tmp_path / "run")


def test_an_observer_defines_what_it_needs() -> None:
    class Rows:
        seen: ClassVar[list[int]] = []

        def on_row(self, row: Mapping[str, Any]) -> None:
            self.seen.append(row["step"])

    whole = listening(Rows())
    whole.on_phase("load", 1)
    whole.on_row({"step": 3})
    assert Rows.seen == [3]

    class Mistaken:
        def on_rows(self, row: Mapping[str, Any]) -> None:
            """Nobody calls it."""

    with pytest.raises(TypeError, match=r"method of Mistaken.*'on_rows'; did you mean 'on_row'"):
        listening(Mistaken())
