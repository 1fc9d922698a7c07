"""A base model without chat template: trained, resumed, measured, exported and handed on with the one it was given."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from llm_gym import embedded
from llm_gym.chat import load_chat
from llm_gym.cli.group import llmgym
from llm_gym.errors import ConfigError, SettingError
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.loops.environments import env_specs
from llm_gym.harness.loops.pipeline import check_plan, read_plan, run_plan
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.runs.export import export_run
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.templates import NAMED
from llm_gym.tokenizer import load_tokenizer

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = ("prompts_per_step=2", "group_size=2", "eval.episodes=2", "sampling.max_tokens=6", "checkpoint.every=1")
TRAIN = ["train", "--env", "GSM8K-v0", "--env-arg", "dataset=sample", *(w for s in SMALL for w in ("--set", s))]
ASK = [{"role": "user", "content": "6 * 7?"}]
FRAME = "User:\n6 * 7?\n\nAssistant:\n"


def without_template(source: Any, folder: Path) -> Path:
    """A folder with a tiny random model and a tokenizer, no chat template anywhere."""
    tokenizer = copy.copy(load_tokenizer(source))
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = Qwen3Config(vocab_size=len(tokenizer), **SIZES, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    assert not list(folder.rglob("*.jinja"))
    return folder


def run(*words: Any) -> str:
    done = CliRunner().invoke(llmgym, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_template(embedded.PATH, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; its template came from a file that is gone."""
    out = tmp_path_factory.mktemp("runs") / "base"
    file = out.parent / "mine.jinja"
    file.write_text(NAMED["plain"].replace("Assistant:", "Helper:"), "utf-8")
    run(*TRAIN, "--model", base, "--steps", 1, "--chat-template", file, "--out", out)
    file.unlink()
    return out


def frame_of(folder: Path) -> str:
    """What a model in a folder is asked, as plain transformers would ask it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True))


def first_context(out: Path) -> Any:
    """The ids that the first episode of a run began with."""
    return RunFolder(out).read_episodes("step_000001")[0].turns[0].prompt


def test_a_base_model_trains_by_name(base: Path, tmp_path: Path) -> None:
    run(*TRAIN, "--model", base, "--steps", 1, "--chat-template", "plain", "--out", tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert (checkpoint / "chat_template.jinja").is_file()
    assert frame_of(checkpoint) == FRAME
    assert load_chat(checkpoint).stop_ids == (load_tokenizer(base).eos_token_id,)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["chat_template"] == "plain"
    shown = load_tokenizer(base).decode(first_context(tmp_path / "run"))
    assert "User:\n" in shown
    assert shown.endswith("\n\nAssistant:\n")


def test_without_a_template_the_option_is_named(base: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(llmgym, [*TRAIN, "--model", str(base), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "has no chat template; pass chat_template=plain (--chat-template plain)" in done.output
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(llmgym, [*TRAIN, "--model", str(base), "--chat-template", "plian"])
    assert done.output.strip() == "Error: chat_template: unknown value 'plian'; did you mean 'plain'?"


def test_resumed_replayed_and_measured_with_what_the_run_used(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    run("train", "--resume", "--steps", 2, "--out", out)
    assert [frame_of(folder) for folder in sorted((out / "checkpoints").glob("step_*"))] == [
        FRAME.replace("Assistant", "Helper")
    ] * 2
    assert "are equal to the last bit" in run("replay", out, "--step", 2)
    measured = tmp_path / "eval.json"
    run("eval", "--model", out, "--episodes", 2, "--max-tokens", 4, "--out", measured)
    assert "failed" not in json.loads(measured.read_text())["stop_reasons"]


def test_measured_with_another(base: Path, trained: Path, tmp_path: Path) -> None:
    words = ("eval", "--env", "Arithmetic-v0", "--episodes", 2, "--max-tokens", 4)
    run(*words, "--model", base, "--chat-template", "plain")
    run(*words, "--model", trained, "--chat-template", "plain")


def test_exported_with_the_runs_or_another(trained: Path, tmp_path: Path) -> None:
    run("export", trained, tmp_path / "same")
    assert frame_of(tmp_path / "same") == FRAME.replace("Assistant", "Helper")
    export_run(trained, tmp_path / "other", chat_template="plain")
    assert frame_of(tmp_path / "other") == FRAME
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        export_run(trained, tmp_path / "none", chat_template="plan")
    assert not (tmp_path / "none").exists()


def test_fine_tuned_then_trained(base: Path, tmp_path: Path) -> None:
    """Stages: the second starts from a model that has the template; every stage is looked at before the first."""
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}?", "completion": str(2 * i)}) + "\n" for i in range(8)))
    tune = {"dataset": str(data), "steps": 1, "examples_per_step": 4, "chat_template": "plain"}
    train = {"env": "Arithmetic-v0", "steps": 1, "prompts_per_step": 2, "group_size": 2, "eval": {"episodes": 0}}
    train |= {"sampling": {"max_tokens": 4}}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"model": str(base), "stages": [{"sft": tune}, {"train": train}]}))
    found = run_plan(read_plan(file), tmp_path / "out")
    assert frame_of(Path(found)) == FRAME == frame_of(tmp_path / "out" / "1-sft" / "model")
    file.write_text(yaml.safe_dump({"model": str(base), "stages": [{"train": train}]}))
    with pytest.raises(SettingError, match=r"1-train: .* has no chat template"):
        check_plan(read_plan(file))


def test_an_adapter_carries_it_too(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(*TRAIN, "--model", base, "--steps", 1, "--chat-template", "plain", "--set", "lora.rank=2", "--out", out)
    (checkpoint,) = (out / "checkpoints").glob("step_*")
    assert (checkpoint / "adapter_config.json").is_file()
    assert load_file(checkpoint / "adapter_model.safetensors")
    run("export", out, tmp_path / "plain")
    assert frame_of(tmp_path / "plain") == FRAME == frame_of(checkpoint)


def test_a_run_has_one_template(base: Path) -> None:
    """As an argument of one environment it would not be saved with the model."""
    with pytest.raises(ConfigError, match=r"env_args\.chat_template: a run has one template"):
        env_specs(load(TrainConfig, model=str(base), env_args={"chat_template": "plain"}))
    found = env_specs(load(TrainConfig, model=str(base), chat_template="plain"))
    assert found[0].chat.text(found[0].chat.open(ASK)).endswith(FRAME)


def test_a_real_tokenizer_without_its_template(tmp_path: Path) -> None:
    """Llama 3.1's, which puts a BOS before every text."""
    real = pytest.importorskip("real_tokenizers", reason="the real tokenizers are not part of this branch")
    model = without_template(real.folder("llama3_1"), tmp_path / "base")
    config = load(TrainConfig, None, [*SMALL, "eval.episodes=0"], model=str(model), chat_template="plain", steps=1)
    Trainer(replace(config, env="GSM8K-v0", env_args={"dataset": "sample"}), out=tmp_path / "run").train()
    shown = load_tokenizer(model).decode(first_context(tmp_path / "run"))
    assert shown.startswith("<|begin_of_text|>")
    assert shown.endswith("\n\nAssistant:\n")
    saved = (tmp_path / "run" / "checkpoints" / "step_000001" / "chat_template.jinja").read_text("utf-8")
    assert saved == load_tokenizer(model, "plain").chat_template
