"""What a run that goes on may be given, and what becomes of the settings that it had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from random_configurations import COUNT, KillAfter, Killed
from tiny_models import tiny

from llm_gym.cli.group import llmgym
from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.learner.weights import restore, save
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.loops.resuming import changed, check_changes
from llm_gym.harness.loops.starting import load_group_learner
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.tokenizer import load_tokenizer

SMALL = ["steps=2", "prompts_per_step=2", "group_size=2", "sampling.max_tokens=4", "eval.episodes=0"]
SMALL += ["checkpoint.every=1", "checkpoint.keep=9", "optimizer.lr=0.001"]


def config(*sets: str) -> TrainConfig:
    return load(TrainConfig, None, [f"env={COUNT}", *SMALL, *sets])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, complete."""
    out = tmp_path_factory.mktemp("resuming") / "run"
    Trainer(config(), out=out).train()
    return out


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


REFUSED = {
    "another model": ((), "model=/some/where", "model"),
    "another optimizer": ((), "optimizer.name=muon", "optimizer.name"),
    "another optimizer with other moments": ((), "optimizer.name=adafactor", "optimizer.name"),
    "other adapters": (("lora.rank=4",), "lora.rank=8", "lora.rank"),
    "adapters where there were none": ((), "lora.rank=8", "lora"),
    "no adapters any more": (("lora.rank=4",), "lora=null", "lora"),
    "other weights": ((), "memory.train_layers=head", "memory.train_layers"),
    "another environment": ((), "env=Arithmetic-v0", "env"),
    "another mixture": ((f"envs=[{{env: {COUNT}}}]",), "envs=[{env: GuessNumber-v0}]", "envs.0.env"),
    "more environments": ((f"envs=[{{env: {COUNT}}}]",), f"envs=[{{env: {COUNT}}}, {{env: GuessNumber-v0}}]", "envs"),
    "another curriculum": (("curriculum.name=epochs",), "curriculum.name=difficulty", "curriculum.name"),
    "other rows of a curriculum": (
        ("curriculum.name=epochs", "env_args.dataset=a.jsonl"),
        "env_args.dataset=b.jsonl",
        "env_args.dataset",
    ),
    "another size of groups that wait": (
        ("filters.spread=0", "oversample.max_factor=2"),
        "group_size=3",
        "group_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_checkpoint_holds_cannot_change(case: str) -> None:
    begun, given, name = REFUSED[case]
    before, after = config(*begun), config(*begun, given)
    with pytest.raises(ConfigError) as caught:
        check_changes(changed(before, after), before, step=1, steps=2, out="runs/x")
    said = str(caught.value)
    assert said.startswith(f"{name}: ")
    assert "the checkpoint" in said
    check_changes(changed(before, after), before, step=0, steps=2, out="runs/x")  # nothing is saved yet


FREE = (
    "optimizer.lr=1e-6",
    "optimizer.betas=[0.8, 0.9]",
    "group_size=4",
    "prompts_per_step=3",
    "loss.kl_weight=0.1,loss.kl=k2",
    "sampling.temperature=0.5",
    "env_args.dataset=b.jsonl",
    "curriculum.target=0.3",
    "device=cpu",
    "policy.max_rows=3",
    "eval.episodes=2",
    "seed=9",
)


@pytest.mark.parametrize("given", FREE)
def test_everything_else_may(given: str) -> None:
    before, after = config(), config(*given.split(",") if "kl" in given else [given])
    different = changed(before, after)
    assert different
    check_changes(different, before, step=1, steps=2, out="runs/x")


@pytest.mark.parametrize("given", ["optimizer.name=muon", "lora.rank=2"])
def test_a_refusal_leaves_the_run_as_it_was(run: Path, given: str) -> None:
    before = (run / "config.yaml").read_text()
    words = ["train", "--resume", "--out", str(run), "--steps", "3", "--set", given]
    result = CliRunner().invoke(llmgym, words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {given.partition('.rank')[0].partition('=')[0]}: ")
    assert (run / "config.yaml").read_text() == before
    assert len(RunFolder(run).metrics()) == 3


def test_a_complete_run_keeps_its_settings(run: Path) -> None:
    """Nothing is left that could be trained with others; on with the same, it says again what came out."""
    before = (run / "config.yaml").read_text()
    words = ["train", "--resume", "--out", str(run)]
    result = CliRunner().invoke(llmgym, [*words, "--set", "optimizer.lr=0.5"])
    assert result.exit_code == 2
    assert "optimizer.lr: got 0.5 in place of 0.001" in result.stderr
    assert "has done 2 steps of 2" in result.stderr
    assert (run / "config.yaml").read_text() == before
    assert CliRunner().invoke(llmgym, words).exit_code == 0
    assert (run / "config.yaml").read_text() == before
    (one,) = replay(run, 2)
    assert one.metrics
    assert not one.differences


class Heard(KillAfter):
    """Keeps what is said."""

    def __init__(self, rows: int = 99) -> None:
        super().__init__(rows)
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def test_other_settings_count_from_the_next_step_on_and_earlier_steps_replay(run: Path, tmp_path: Path) -> None:
    heard = Heard()
    more = config("steps=4", "optimizer.lr=0.01", "optimizer.betas=[0.5, 0.6]", "sampling.temperature=0.7")
    again = Trainer(more, out=run, resume=True, observer=heard)
    assert {(group["betas"], group["peak"]) for o in again.learner.optimizers for group in o.param_groups} == {
        ((0.5, 0.6), 0.01)
    }, "the checkpoint's options do not win over the settings"
    rows: list[dict[str, Any]] = again.train()
    (told,) = [note for note in heard.notes if note.startswith("resume: ")]
    assert "from step 3 on" in told
    for words in ("steps 4 (was 2)", "optimizer.lr 0.01 (was 0.001)", "sampling.temperature 0.7 (was 1.0)"):
        assert words in told
    assert len(rows) == 5
    for step in (1, 2, 3, 4):
        (one,) = replay(run, step)
        assert one.metrics > 5
        assert not one.differences, (step, one.differences[:2])
    assert load(TrainConfig, RunFolder(run).config_of(2)).optimizer.lr == 0.001
    assert load(TrainConfig, RunFolder(run).config_of(3)).optimizer.lr == 0.01


def test_killed_twice_with_other_settings_each_time(run: Path) -> None:
    """Steps that were forgotten leave no settings behind."""
    for lr in ("0.01", "0.02"):
        with pytest.raises(Killed):
            Trainer(
                config("steps=4", f"optimizer.lr={lr}", "checkpoint.every=9"), out=run, resume=True, observer=Heard(1)
            ).train()
    Trainer(config("steps=4", "optimizer.lr=0.03"), out=run, resume=True).train()
    rates = [load(TrainConfig, RunFolder(run).config_of(step)).optimizer.lr for step in (1, 2, 3, 4)]
    assert rates == [0.001, 0.001, 0.03, 0.03]


@pytest.mark.parametrize(
    "words", ["train --resume --out {}", "sft --resume --data x --out {}", "run {} --resume --out {}"]
)
def test_there_must_be_something_to_go_on_with(words: str, run: Path) -> None:
    wrong = run.with_name("runn")
    if words.startswith("run"):
        plan = run.with_name("plan.yaml")
        plan.write_text("stages: [train: {steps: 1}]")
        words = words.replace("{}", str(plan), 1)
    result = CliRunner().invoke(llmgym, words.format(wrong).split())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: --resume: '{wrong}' holds no run; ")
    if not words.startswith("run"):
        assert f"did you mean '{run}'?" in result.stderr
    assert not wrong.exists()


def test_a_mixture_of_experts_that_is_trained_whole_goes_on_and_is_replayed(tmp_path: Path) -> None:
    """Its experts are fused in memory, and stand apart in a checkpoint."""
    base = tmp_path / "base"
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    tiny("Mixtral", vocab_size=4096, **sizes).save_pretrained(base)
    load_tokenizer(None).save_pretrained(base)
    settings = config(f"model={base}", "sampling.max_tokens=12", "group_size=4", "seed=1")
    want = Trainer(settings, out=tmp_path / "whole").train()[-1]
    with pytest.raises(Killed):
        Trainer(settings, out=tmp_path / "run", observer=KillAfter(2)).train()
    got = Trainer(settings, out=tmp_path / "run", resume=True).train()[-1]
    assert got["policy/kl_from_start"] == want["policy/kl_from_start"] > 0
    (one,) = replay(tmp_path / "run", 2)
    assert one.tensors
    assert not one.differences


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    """The rate of the last step too: it stays where the next step has nothing to train."""
    first, second = (load_group_learner(config()).learner for _ in "ab")
    first.optimizers[0].param_groups[0]["lr"] = 2e-4
    (tmp_path / "checkpoint").mkdir()
    save(first, None, tmp_path / "checkpoint")
    restore(second, tmp_path / "checkpoint")
    assert second.optimizers[0].param_groups[0]["lr"] == 2e-4
    assert second.state_dict()["optimizers"] == first.state_dict()["optimizers"]
