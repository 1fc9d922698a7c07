from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from rich.console import Console

from llm_gym.harness import TrainConfig, Trainer
from llm_gym.harness.loops.progress import LINES, TrainProgress, evaluation


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


RUN = """
from llm_gym.harness import TrainConfig, Trainer
from llm_gym.harness.loops.sft import SFTConfig, sft
small = {"steps": 1, "group_size": 2, "prompts_per_step": 2, "sampling": {"max_tokens": 2}, "eval": {"episodes": 0}}
Trainer(TrainConfig(**small), out="run").train()
chat = {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one"}]}
sft(SFTConfig(steps=1, examples_per_step=1), [chat])
"""


def test_without_an_observer_a_run_shows_itself_on_a_terminal(tmp_path: Path) -> None:
    master, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    run = subprocess.Popen(
        [sys.executable, "-c", RUN], stdout=terminal, stderr=terminal, stdin=terminal, cwd=tmp_path, env=environment
    )
    os.close(terminal)
    screen = b""
    with suppress(OSError):  # how a terminal says that nobody writes to it any more
        while chunk := os.read(master, 4096):
            screen += chunk
    os.close(master)
    text = screen.decode()
    assert run.wait() == 0, text
    assert "Arithmetic-v0, the embedded model, 1 steps -> run" in text
    assert "loading the embedded model ..." in text
    assert "reward 0.000" in text
    assert "sft: learning rate" in text
    assert "loss " in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0, "the cursor is given back"


def test_in_a_notebook_one_line_is_written_anew(tmp_path: Path) -> None:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    shown: list[tuple[str, str]] = []

    def hear(message) -> None:
        content = message["content"]
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown.append((message["msg_type"], content["data"]["text/plain"]))
        shown.append((message["msg_type"], content.get("text", "")))

    try:
        assert client.execute_interactive(RUN, output_hook=hear, timeout=300)["content"]["status"] == "ok", shown
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    lines = [text for kind, text in shown if kind == "update_display_data"]
    assert any(f"{'━' * 30} 1/1 reward 0.000" in line for line in lines)
    assert any("1/1 loss " in line for line in lines)
    assert any("1 steps -> run" in text for kind, text in shown if kind == "stream")


def test_nothing_is_shown_where_nobody_watches(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    exec(RUN, {})
    assert capfd.readouterr() == ("", "")


def test_a_run_that_fails_gives_the_terminal_back(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = TrainProgress(Console(file=screen, force_terminal=True, width=120))
    small = {"group_size": 2, "prompts_per_step": 2, "sampling": {"max_tokens": 2}, "eval": {"episodes": 0}}
    trainer = Trainer(TrainConfig(**small), out=tmp_path / "run", observer=progress)  # type: ignore[arg-type]
    trainer.learner.model = None
    with pytest.raises(AttributeError):
        trainer.train()
    assert not progress.bar.moving
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l") > 0


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
