"""Every bad setting is one sentence on standard error, exit code 2, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym

QA = "train --env Dataset-v0 --env-arg dataset={tmp}/qa.jsonl --env-arg prompt=question"

BAD = {
    "an environment": ("train --env Arithmetc-v0", ("env", "'Arithmetc-v0'", "'Arithmetic-v0'")),
    "an environment's module": ("train --env no_such_module:me/X-v0", ("env", "'no_such_module'")),
    "an environment argument": ("train --env-arg digit_max=3", ("'digit_max'", "'digits_max'")),
    "an argument's type": ("train --env-arg digits_max=x", ("Arithmetic-v0", "'digits_max': 'x'")),
    "an argument's value": ("train --env-arg split=tset", ("split", "'tset'", "'test'")),
    "an argument's form": ("train --env-arg digits_max", ("--env-arg", "'digits_max'", "key=value")),
    "a missing argument": ("train --env Dataset-v0", ("needs dataset", "--env-arg dataset=")),
    "a data set": ("train --env GSM8K-v0 --env-arg dataset={tmp}/qb.jsonl", ("dataset", "qb.jsonl", "qa.jsonl")),
    "a column": (QA.replace("question", "questin") + " --env-arg reward=math:sqrt", ("'questin'", "'question'")),
    "a reward's module": (QA + " --env-arg reward=no_such_module:f", ("reward", "'no_such_module:f'")),
    "a reward's function": (QA + " --env-arg reward=math:sqr", ("reward", "'sqr'", "'sqrt'")),
    "a model": ("train --model {tmp}/model", ("{tmp}/model", "no such folder")),
    "a key": ("train --set stepz=3", ("'stepz'", "'steps'")),
    "a nested key": ("train --set loss.clip_hig=0.3", ("'loss.clip_hig'", "'loss.clip_high'")),
    "a value": ("train --set steps=many", ("steps", "'many'", "whole number")),
    "a range": ("train --steps 0", ("steps", "got 0")),
    "an assignment": ("train --set steps", ("--set", "'steps'")),
    "a name": ("train --set advantage=grupo", ("advantage", "'grupo'", "'group_norm'")),
    "an engine to train with": ("train --policy vlm", ("policy.engine", "'vlm'", "'vllm'")),
    "a text-only engine": ("train --policy openai", ("policy.engine", "'openai'", "new weights")),
    "a synchronisation": ("train --set policy.sync=shard", ("policy.sync", "'shard'", "'shared'")),
    "an engine's synchronisation": ("train --policy vllm --set policy.sync=file", ("'file'", "'vllm'", "tensors")),
    "a sampling": ("train --set sampling.top_p=2", ("sampling.top_p", "2.0")),
    "a configuration file": ("train --config {tmp}/none.yaml", ("none.yaml", "No such file")),
    "broken YAML": ("train --config {tmp}/bad.yaml", ("bad.yaml", "not YAML")),
    "a used folder": ("train --out {tmp}/used", ("used", "--resume")),
    "nothing to resume": ("train --resume", ("--resume", "--out")),
    "an environment to measure": ("eval --env GSM8k-v0", ("'GSM8k-v0'", "'GSM8K-v0'")),
    "a model to measure": ("eval --model {tmp}/model", ("{tmp}/model", "no such folder")),
    "an engine": ("eval --engine vlm", ("engine", "'vlm'", "'vllm'")),
    "an engine's option": ("eval --engine server --option server=http://x", ("'server'", "'servers'")),
    "an option's form": ("eval --engine server --option servers", ("--option", "'servers'", "key=value")),
    "no server": ("eval --engine server", ("servers", "llmgym serve")),
    "a server": ("eval --engine server --option servers=http://127.0.0.1:1 --option start_seconds=0", ("127.0.0.1:1",)),
    "an endpoint's model": ("eval --engine openai", ("model",)),
    "an argument of vLLM's": ("serve --set max_model_len", ("--set", "max_model_len", "key=value")),
    "too many episodes": ("eval --env GSM8K-v0 --env-arg dataset=sample --episodes 99", ("--episodes", "99", "12")),
    "two ways to sample": ("eval --greedy --temperature 0.5", ("--temperature", "--greedy")),
    "a temperature": ("eval --temperature -1", ("temperature", "-1.0")),
    "an unfinished run": ("eval --model {tmp}/used", ("used", "checkpoint")),
    "no chats": ("sft", ("data",)),
    "chats": ("sft --data {tmp}/none.jsonl", ("none.jsonl",)),
    "a run": ("view {tmp}/nowhere", ("nowhere", "does not exist")),
    "an environment to describe": ("envs Guess-v0", ("'Guess-v0'", "'GuessNumber-v0'")),
}


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    (tmp_path / "qa.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "used" / "metrics.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize(("line", "words"), BAD.values(), ids=BAD)
def test_one_sentence(tmp: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp)
    before = sorted(tmp.rglob("*"))
    done = CliRunner().invoke(llmgym, line.format(tmp=tmp).split())
    assert done.stderr.startswith("Error: "), (done.stderr, done.exception)
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word.format(tmp=tmp) in done.stderr
    assert (done.exit_code, done.stdout) == (2, "")
    assert sorted(tmp.rglob("*")) == before, "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    ("line", "near"), [("trian", "train"), ("train --stepss 3", "--steps"), ("config sftt", "sft"), ("view", "RUN")]
)
def test_what_click_refuses_names_the_way_out(line: str, near: str) -> None:
    done = CliRunner().invoke(llmgym, line.split())
    assert done.exit_code == 2
    assert near in done.stderr
    assert done.stdout == ""


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMGYM_DEBUG", "1")
    done = CliRunner().invoke(llmgym, ["envs", "Guess-v0"])
    assert "Guess-v0" in str(done.exception)
    assert done.exc_info is not None
    assert done.exc_info[0].__name__ == "SettingError"
