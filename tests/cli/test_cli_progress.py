from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from llm_gym.cli.progress import LINES, TrainProgress, evaluation
from llm_gym.harness import TrainConfig


def watched(terminal: bool, steps: int) -> str:
    """What a run of `steps` steps shows."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, highlight=False, color_system=None)
    progress = TrainProgress(console)
    progress.on_start(TrainConfig(steps=steps), Path("runs/x"), 0)
    progress.on_row({"step": 0, "eval/greedy_reward": 0.5, "eval/sampled_reward": 0.25})
    for step in range(1, steps + 1):
        progress.on_phase("rollout", 8)
        progress.on_progress(8)
        row = {"step": step, "reward/mean": step / steps, "tokens_per_second/rollout": 12345.0, "time/step": 2.0}
        progress.on_row(row | ({"eval/greedy_reward": 1.0} if step == steps else {}))
    progress.on_end([])
    return screen.getvalue()


def test_lines_without_a_terminal() -> None:
    lines = watched(False, 120).splitlines()
    assert lines[0] == "step 0/120: reward on unseen problems: greedy 0.500, sampled 0.250"
    assert lines[1] == "playing 8 episodes of training ..."  # said once
    assert lines[2] == "step 10/120: reward 0.083, 12.3k tokens/s, 3 min 40 s left"
    assert lines[-1] == "step 120/120: reward on unseen problems: greedy 1.000"
    assert len(lines) == LINES + 3


def test_the_first_line_says_the_learning_rate_and_why(capsys) -> None:
    TrainProgress(Console(file=io.StringIO())).on_start(TrainConfig(steps=3), Path("runs/x"), 0)
    want = "Arithmetic-v0, the embedded model, 3 steps -> runs/x, learning rate 0.0002 (all weights, hidden size 128)"
    assert capsys.readouterr().out.splitlines() == [want]


def test_short_runs_say_every_step() -> None:
    assert len(watched(False, 3).splitlines()) == 6


def test_a_bar_on_a_terminal() -> None:
    text = watched(True, 5)
    assert "5/5" in text
    assert "rollout" in text
    assert "reward 1.000, 12.3k tokens/s" in text
    assert "\x1b[?25h" in text, "the cursor is given back"
    assert "step 5/5: reward on unseen problems: greedy 1.000" in text


def test_rows_without_numbers() -> None:
    screen = io.StringIO()
    progress = TrainProgress(Console(file=screen, width=100))
    progress.on_start(TrainConfig(steps=2), Path("x"), 1)
    progress.on_row({"step": 2, "reward/mean": None, "time/step": None, "eval/greedy_reward": None})
    assert screen.getvalue() == ""


def test_evaluations_on_several_environments_are_one_line() -> None:
    row = {"eval/greedy_reward": 0.5, "eval/sampled_reward": 0.25, "eval/sampled_reward_low": 0.2, "eval/pass@2": 0.4}
    row |= {"eval/pass@16": 0.75, "eval/three/greedy_reward": 0.125, "eval/three/sampled_reward": None}
    said = "reward on unseen problems: greedy 0.500, sampled 0.250, pass@16 0.750; three: greedy 0.125"
    assert evaluation(row, "unseen problems") == said
    assert evaluation({"reward/mean": 1.0}, "unseen problems") == ""
