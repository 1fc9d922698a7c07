"""provenance.yaml: what a run was made with, and nothing about who made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.runs.provenance import commit, describe

ENV = "llm_gym/Arithmetic-v0"


def git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=somebody-here", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True, text=True).stdout


def test_a_commit_and_whether_it_is_what_is_there(tmp_path: Path) -> None:
    assert commit(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) == {}, "nothing committed yet"
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text("")
    assert commit(tmp_path / "runs") == {"commit": head, "dirty": False}, "a run folder makes no repository dirty"
    (tmp_path / "a.py").write_text("2")
    assert commit(tmp_path) == {"commit": head, "dirty": True}


def test_git_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = describe(ENV, 0)
    assert found["repository"] == {}
    assert "commit" not in found["llm_gym"]


def test_versions_are_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "--allow-empty", "-qm", "one")
    monkeypatch.setenv("SOME_TOKEN", "hf_very_secret")
    monkeypatch.setenv("USER", "somebody-here")
    found = describe(ENV, 7)
    assert (found["step"], found["processes"]) == (7, 1)
    assert found["packages"]["torch"] == torch.__version__
    assert found["repository"]["commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert found["environment"]["entry_point"] == "llm_gym.envs.arithmetic:Arithmetic"
    assert found["environment"]["package_version"] == found["llm_gym"]["version"]
    text = yaml.safe_dump(found)
    assert yaml.safe_load(text) == found
    for private in ("hf_very_secret", "somebody-here", str(tmp_path), str(Path.home())):
        assert private not in text


def test_every_start_of_a_run_is_written(tmp_path: Path) -> None:
    sets = ["eval.episodes=0", "prompts_per_step=1", "group_size=2", "sampling.max_tokens=4", "checkpoint.every=1"]
    Trainer(load(TrainConfig, sets=sets, steps=1), out=tmp_path / "run").train()
    Trainer(load(TrainConfig, sets=sets, steps=2), out=tmp_path / "run", resume=True).train()
    starts = yaml.safe_load((tmp_path / "run" / "provenance.yaml").read_text())
    assert [start["step"] for start in starts] == [0, 1]
    assert all(start["environment"]["id"] == ENV for start in starts)
    assert load(TrainConfig, tmp_path / "run" / "config.yaml").steps == 2
