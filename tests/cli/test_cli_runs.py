"""Whole commands on the real engine: train, interrupt, resume, measure, look."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from llm_gym.cli.group import COMMANDS, llmgym
from llm_gym.cli.options import chosen
from llm_gym.harness.runs.run_folder import RunFolder

SETTINGS = ("prompts_per_step=2", "group_size=2", "eval.episodes=8", "sampling.max_tokens=8", "checkpoint.every=1")
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


def started(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "llm_gym.cli", *words], text=True, cwd=cwd, env=environment, **pipes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three small steps, and what was said at the end."""
    out = tmp_path_factory.mktemp("runs") / "small"
    done = CliRunner().invoke(llmgym, ["train", "--steps", "3", "--seed", "1", "--out", str(out), *SMALL])
    assert done.exit_code == 0, done.output
    return out, done.stdout


def test_help_is_quick_to_import() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from llm_gym.cli import group;"
        "done = CliRunner().invoke(group.llmgym, ['--help']); assert done.exit_code == 0;"
        "print(done.output); print([m for m in ('torch', 'transformers', 'datasets', 'rich') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("[]")
    assert all(f"\n  {name} " in said for name in COMMANDS)


def test_the_entry_point_runs(tmp_path: Path) -> None:
    process = started("envs", "Arithmetc-v0", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "Error: env: unknown value 'Arithmetc-v0'; did you mean 'Arithmetic-v0'?\n"


def test_train_says_what_happened(trained: tuple[Path, str]) -> None:
    out, said = trained
    assert f"3 steps -> {out}" in said
    assert "Mean training reward by step" in said
    assert "Reward on 8 unseen problems:" in said
    assert "For example: What is " in said
    assert f"Report: {out / 'report.html'}" in said
    assert f"llmgym eval --model {out}" in said
    html = (out / "report.html").read_text("utf-8")
    assert "Before and after" in html
    assert '<span class="p' in html, "tokens are shown one by one"


def test_several_environments_are_a_mixture(tmp_path: Path) -> None:
    out = tmp_path / "both"
    envs = ["--env", "Arithmetic-v0=2", "--env", "GuessNumber-v0", "--env-arg", "max_tokens=8"]
    done = CliRunner().invoke(llmgym, ["train", *envs, "--steps", "1", "--out", str(out), *SMALL])
    assert done.exit_code == 0, done.output
    assert f"Arithmetic-v0 + GuessNumber-v0, the embedded model, 1 steps -> {out}" in done.stdout
    assert "Arithmetic-v0 + GuessNumber-v0" in (out / "report.html").read_text("utf-8")
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/mean/Arithmetic-v0", "reward/mean/GuessNumber-v0"} <= row.keys()
    assert "eval/GuessNumber-v0/greedy_reward" in row
    again = CliRunner().invoke(llmgym, ["eval", "--model", str(out), "--episodes", "4"])
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("llm_gym/Arithmetic-v0, ")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], {}),
        (["A"], {"env": "A", "envs": ()}),
        (["A=3"], {"envs": [{"env": "A", "weight": 3.0}]}),
        (["A", "m:B=0.5"], {"envs": [{"env": "A", "weight": 1.0}, {"env": "m:B", "weight": 0.5}]}),
    ],
)
def test_env_options_as_settings(given: list[str], wanted: dict[str, object]) -> None:
    assert chosen(given) == wanted


def test_a_weight_that_is_no_number_is_refused() -> None:
    done = CliRunner().invoke(llmgym, ["train", "--env", "GSM8K-v0=much"])
    assert done.exit_code == 2
    assert "--env: got 'GSM8K-v0=much', want ID=WEIGHT such as GSM8K-v0=2." in done.stderr


def test_eval_takes_the_environment_of_the_run(trained: tuple[Path, str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "result.json"
    words = ["eval", "--model", str(trained[0]), "--episodes", "8", "--out", str(file)]
    done = CliRunner().invoke(llmgym, words)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert (found["env"], found["env_args"]["split"], found["episodes"]) == ("llm_gym/Arithmetic-v0", "test", 8)
    rows = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    assert found["reward"]["mean"] == rows[-1]["eval/greedy_reward"], "the same unseen problems, the same weights"
    assert found["reward"]["low"] <= found["reward"]["mean"] <= found["reward"]["high"]
    assert "95% confidence" in done.stdout


def test_eval_plays_every_row_in_order(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["eval", "--env", "GSM8K-v0", "--env-arg", "dataset=sample", "--env-arg", "max_tokens=4", "--sampled"]
    done = CliRunner().invoke(llmgym, [*words, "--out", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["rows"] == found["episodes"] == sum(found["stop_reasons"].values()) == 12
    assert found["failed"] == 0


def test_eval_plays_each_problem_k_times(trained: tuple[Path, str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["eval", "--model", str(trained[0]), "--episodes", "4", "-k", "4", "--max-tokens", "4", "--out", str(file)]
    done = CliRunner().invoke(llmgym, words)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert (found["problems"], found["episodes"], found["sampling"]["temperature"]) == (4, 16, 1.0)
    assert list(found["pass"]) == ["1", "2", "4"]
    assert "4 unseen problems, 4 times each" in done.stdout
    assert "pass@4" in done.stdout
    refused = CliRunner().invoke(llmgym, [*words, "--greedy"])
    assert refused.exit_code != 0
    assert "-k: got 4 with --greedy" in refused.output


def test_view_makes_the_report_again(trained: tuple[Path, str]) -> None:
    page = trained[0] / "report.html"
    page.unlink()
    done = CliRunner().invoke(llmgym, ["view", str(trained[0])])
    assert (done.exit_code, done.stdout.strip()) == (0, str(page))
    assert page.is_file()


def test_ctrl_c_says_how_to_go_on_and_going_on_works(tmp_path: Path) -> None:
    words = ["train", "--steps", "400", "--out", "run", *SMALL]
    process = started(*words, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 33/400" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "llmgym train --resume --out run" in err
    assert "Traceback" not in err + out
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    done = CliRunner().invoke(llmgym, ["train", "--resume", "--out", str(tmp_path / "run"), "--steps", f"{len(rows)}"])
    assert done.exit_code == 0, done.output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(rows) + 1))


@pytest.mark.parametrize("command", ["train", "sft"])
def test_sigterm_is_ctrl_c(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system ends a run so; it says how to go on, and going on works."""

    def otherwise(number: int, frame: object) -> None:
        raise AssertionError("the run does not listen to SIGTERM")

    def log(run: RunFolder, row: Mapping[str, Any]) -> None:
        logged(run, row)
        if row["step"] == 1:
            signal.raise_signal(signal.SIGTERM)

    logged = RunFolder.log
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "1 + 1", "completion": "2"}) + "\n")
    words = {"train": SMALL, "sft": ["--data", str(chats), "--set", "examples_per_step=1"]}[command]
    out = str(tmp_path / "run")
    before = signal.signal(signal.SIGTERM, otherwise)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "log", log)
            done = CliRunner().invoke(llmgym, [command, "--steps", "2", "--out", out, *words])
        assert done.exit_code == 130, done.output
        assert f"llmgym {command} --resume --out {out}" in done.stderr
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "on its way out, nothing stops it"
        signal.signal(signal.SIGTERM, otherwise)
        done = CliRunner().invoke(llmgym, [command, "--resume", "--out", out])
        assert done.exit_code == 0, done.output
        assert signal.getsignal(signal.SIGTERM) is otherwise
    finally:
        signal.signal(signal.SIGTERM, before)


INTERRUPTED = """
import signal, sys, time
from llm_gym.cli import group

class Deleted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def invoke(context):
    del Deleted.one
    while True:
        time.sleep(0.01)

Deleted.one = Deleted()
group.llmgym.get_command(None, "envs").invoke = invoke
sys.argv = ["llmgym", "envs"]
group.main()
"""


def test_ctrl_c_is_not_lost_while_an_object_is_deleted() -> None:
    """Python prints what is raised there, and goes on."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_the_report_is_written_says_how_to_go_on(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_gym.report.write", interrupted)
    done = CliRunner().invoke(llmgym, ["train", "--resume", "--out", str(trained[0])])
    assert done.exit_code == 130
    assert f"llmgym train --resume --out {trained[0]}" in done.stderr


def test_sft_writes_a_model_that_eval_takes(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    chats.write_text(json.dumps(chat) + "\n")
    out = tmp_path / "sft"
    words = ["sft", "--data", str(chats), "--steps", "2", "--out", str(out), "--set", "examples_per_step=2"]
    done = CliRunner().invoke(llmgym, words)
    assert done.exit_code == 0, done.output
    assert f"{out / 'report.html'}" in done.stdout
    words = ["eval", "--env", "Arithmetic-v0", "--model", str(out), "--episodes", "2", "--max-tokens", "4"]
    assert CliRunner().invoke(llmgym, words).exit_code == 0


@pytest.mark.parametrize("way", ["--model {}", "--set model={}"])
def test_a_run_goes_on_from_what_another_has_trained(way: str, trained: tuple[Path, str], tmp_path: Path) -> None:
    words = ["train", "--steps", "1", "--out", str(tmp_path / "next"), *SMALL, *way.format(trained[0]).split()]
    done = CliRunner().invoke(llmgym, words)
    assert done.exit_code == 0, done.output
    settings = yaml.safe_load((tmp_path / "next" / "config.yaml").read_text())
    assert settings["model"] == str(trained[0] / "checkpoints" / "step_000003")


@pytest.mark.parametrize("command", ["train --set model={}", "sft --data x.jsonl --set model={}", "run {}.yaml"])
def test_a_run_that_has_saved_nothing_is_no_model(command: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (tmp_path / "run.yaml").write_text(f"model: {run}\nstages: [train: {{}}]")
    done = CliRunner().invoke(llmgym, command.format(run).split())
    assert done.exit_code == 2
    assert done.stderr == f"Error: model: the run {str(run)!r} has no checkpoint yet.\n"


def test_transcripts_do_not_steer_the_terminal() -> None:
    from llm_gym.cli.train import LINE, one_line

    assert one_line(["a\x1b[2J\nb", "\x9bc\u202e"]) == "a [2J b |  c "
    assert len(one_line(["x" * 1000])) == LINE + 3
