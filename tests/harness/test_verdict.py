"""What is said of a run that teaches nothing: from rows made up, and of a real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_gym import report
from llm_gym.cli.train import closing
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.runs.verdict import LEAST, MOVED, warnings
from llm_gym.harness.settings import dump


def rows(start: float, end: float, *, steps: int = 60, noise: float = 0.04, seed: int = 0, **more: Any) -> list[dict]:
    """A run whose reward goes straight from one value to another."""
    rewards = np.linspace(start, end, steps) + noise * np.random.default_rng(seed).standard_normal(steps)
    step = {"policy/lr": 1e-6, "groups/zero_spread": 0.2, **more}
    return [{"step": 0}, *({"step": i + 1, "reward/mean": float(r), **step} for i, r in enumerate(rewards))]


def test_a_run_that_learns_or_is_short_gets_no_warning() -> None:
    assert warnings(rows(0.5, 0.8)) == []
    assert warnings(rows(0.5, 0.6)) == []
    assert warnings(rows(0.5, 0.5, steps=LEAST - 1)) == []
    assert warnings([]) == []
    distilled = [{**row, "distill/kl": 0.1} for row in rows(0.5, 0.5)]
    assert warnings(distilled) == [], "rewards are not what it follows"
    unseen = {"eval/sampled_reward_low": 0.6, "eval/sampled_reward_high": 0.5}
    assert warnings([*rows(0.5, 0.5), {"step": 0, **unseen}, {"step": 60, **unseen}]) == [], "evaluation says it rose"


def test_noise_is_not_taken_for_learning_or_collapse() -> None:
    """Of 200 runs that stand still, at most 2 are said to have fallen, and at most 2 get no warning at all."""
    said = [warnings(rows(0.5, 0.5, seed=seed)) for seed in range(200)]
    assert sum(not texts for texts in said) <= 2
    assert sum("fell" in text for texts in said for text in texts) <= 2


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (rows(0.56, 0.01, **{"policy/lr": 0.02}), r"reward fell \(0\.4.*0\.1.*smaller optimizer\.lr \(it was 0\.02\)"),
        (rows(0.5, 0.5), r"did not rise beyond its noise .*give or take 0\.0.*another optimizer\.lr \(it was 1e-06\)"),
        (rows(0.5, 0.5, **{MOVED: 3e-7}), r"has not moved \(3\.0e-07 nats.*optimizer\.lr ten times as large"),
        (rows(0.5, 0.5, **{MOVED: 0.05}), "did not rise beyond its noise"),
        (rows(0.0, 0.0, noise=0.0, **{"groups/zero_spread": 1.0}), "In 100% of the groups .* earned the same"),
    ],
)
def test_each_way_of_learning_nothing_has_its_sentence(found: list[dict], said: str) -> None:
    (text,) = warnings(found)
    assert re.search(said, text), text


def test_the_report_and_the_console_say_it(tmp_path: Path) -> None:
    config = load(TrainConfig)
    for name, made, count in (("flat", rows(0.5, 0.5, **{MOVED: 3e-7}), 1), ("good", rows(0.5, 0.9), 0)):
        run = RunFolder(tmp_path / name)
        run.start(dump(config))
        for row in made:
            run.log(row)
        assert report.write(tmp_path / name).read_text("utf-8").count("The policy has not moved") == count
        assert closing(tmp_path / name, config, made).count("\nWarning: The policy has not moved") == count


def test_a_real_run_knows_how_far_it_has_come(tmp_path: Path) -> None:
    """At a rate of 1e-9 nowhere, which is said; at 1e-3 far."""
    small = ["prompts_per_step=2", "group_size=2", "sampling.max_tokens=8", "eval.episodes=0", "loss.entropy_weight=1"]
    ends = []
    for lr, steps in ((1e-9, LEAST), (1e-3, 3)):
        config = load(TrainConfig, sets=[*small, f"optimizer.lr={lr}", f"steps={steps}", "eval.every=2"])
        found = Trainer(config, out=tmp_path / str(lr)).train()
        assert [row["step"] for row in found if MOVED in row] == [*range(2, steps, 2), steps]
        ends.append(found)
    assert 0 <= ends[0][-1][MOVED] < 1e-6
    assert ends[1][-1][MOVED] > 1e-3
    cut, untaught = warnings(ends[0])
    assert "were cut by length" in cut
    assert "nothing to learn from" in untaught or "has not moved" in untaught
