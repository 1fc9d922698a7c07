"""A run that version 0.1 wrote (commit b1e402a: a tiny model, one step) is read, measured and gone on with.

Made by `llmgym train --model tiny --env GuessNumber-v0 --seed 3 --set steps=1 prompts_per_step=2 group_size=2
sampling.max_tokens=6 eval.episodes=2`; `tiny` is a random Qwen3 of 10,816 numbers with the embedded tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llm_gym.cli.group import llmgym
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.runs.run_folder import RunFolder

FIXTURE = Path(__file__).parent / "fixtures" / "run_of_0_1"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # its config.yaml says `model: tiny`
    return tmp_path / "run"


def said(*words: str) -> Result:
    found = CliRunner().invoke(llmgym, words)
    assert found.exit_code == 0, found.output
    return found


def test_its_episodes_are_trajectories(old_run: Path) -> None:
    episodes = RunFolder(old_run).read_episodes("step_000001")
    records = [json.loads(line) for line in (old_run / "episodes" / "step_000001.jsonl").read_text().splitlines()]
    assert len(episodes) == 4
    for episode, record in zip(episodes, records, strict=True):
        assert "format" not in record
        assert episode.reward == record["reward"]
        for turn, old in zip(episode.turns, record["turns"], strict=True):
            assert (turn.prompt.tolist(), turn.completion.tokens.tolist()) == (old["prompt"], old["tokens"])
            assert turn.completion.logprobs.tolist() == old["logprobs"]


def test_its_step_replays(old_run: Path) -> None:
    """To rounding: another processor adds in another order than the one that wrote it."""
    (step,) = replay(old_run, 1)
    recorded = RunFolder(old_run).metrics()[1]
    compared = [name for name in recorded if name.startswith(("policy/", "sampler/", "tokens/trained"))]
    assert len(compared) >= 6
    for name in compared:
        assert step.learned.get(name, recorded[name]) == pytest.approx(recorded[name], rel=1e-4, abs=1e-7)


def test_its_report_is_written(old_run: Path) -> None:
    said("view", str(old_run))
    page = (old_run / "report.html").read_text()
    assert "Guess my number from 1 to 100." in page


def test_it_is_measured(old_run: Path) -> None:
    assert "reward" in said("eval", "--model", str(old_run), "--env", "GuessNumber-v0", "--episodes", "2").output


def test_it_is_gone_on_with(old_run: Path) -> None:
    said("train", "--resume", "--out", str(old_run), "--set", "steps=2")
    assert [row["step"] for row in RunFolder(old_run).metrics()] == [0, 1, 2]
    new = (old_run / "episodes" / "step_000002.jsonl").read_text().splitlines()
    assert {json.loads(line)["format"] for line in new} == {2}
