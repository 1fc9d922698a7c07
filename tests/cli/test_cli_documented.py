"""Every command line that the README and docs/ show, as it stands there, on small numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym
from llm_gym.serving.environments import EnvDoor

ROOT = Path(__file__).parents[2]
SETTINGS = ("prompts_per_step=2", "group_size=2", "eval.episodes=4", "sampling.max_tokens=8", "checkpoint.every=1")
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
MORE = {
    "train": ["--steps", "1", *SMALL],
    "distill": ["--steps", "1", *SMALL],
    "sft": ["--steps", "1"],
    "eval": ["--episodes", "4"],
}
"""What makes a command quick."""
ELSEWHERE = (
    "Qwen/",
    "http://",
    "--nproc",
    "--policy vllm",
    "llmgym serve",
    "llmgym work",
    "stream.serve=",
    "llmgym doctor",
    "wandb",
    "...",
    "[--",
    "strategy=fsdp",
)
"""Signs of what needs a download, a server, processes, or an account, or is no command line: other tests have these."""


def documented() -> list[str]:
    """The lines that begin with `llmgym`, their comments left out."""
    texts = [file.read_text() for file in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    found = {shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith("llmgym ")}
    return sorted(line for line in found if not any(sign in line for sign in ELSEWHERE))


def shown(page: str, language: str) -> str:
    """The first block of code in a language on a page."""
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents speak of."""
    folder = tmp_path_factory.mktemp("home")
    sums = [(f"What is {i} + 1?", str(i + 1)) for i in range(40)]
    for name, columns in {
        "qa": ("prompt", "answer"),
        "tasks": ("prompt", "answer"),
        "chats": ("question", "answer"),
    }.items():
        rows = [json.dumps(dict(zip(columns, one, strict=True))) for one in sums]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "math.json").write_text(json.dumps([{"problem": text, "answer": answer} for text, answer in sums]))
    solve, program = (shown("agents.md", language) for language in ("python", "js"))
    (folder / "my_pkg.py").write_text(f"def score(text, row):\n    return float('1' in text)\n\n\n{solve}")
    (folder / "agent.js").write_text(program)
    small = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "eval": {"episodes": 4}}
    distill = {**small, "distill": {"teacher": "runs/big"}}
    stages = [{"sft": {"dataset": "chats.jsonl", "steps": 1}}, {"train": small}, {"distill": distill}]
    (folder / "stages.yaml").write_text(json.dumps({"model": None, "stages": stages}))  # JSON is YAML
    for name in ("x", "big"):
        words = ["train", "--steps", "12", "--out", str(folder / "runs" / name), *SMALL]
        assert CliRunner().invoke(llmgym, words).exit_code == 0
    return folder


def test_the_documents_show_commands() -> None:
    assert {line.split()[1] for line in documented()} >= {"train", "sft", "distill", "run", "eval", "replay", "export"}


@pytest.mark.parametrize("line", documented())
def test_it_runs(line: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path.cwd())])  # as the entry point does
    command, *words = shlex.split(line)[1:]
    if command == "run":
        shutil.rmtree("runs/x")  # it makes a new one
    more = ["--steps", "13", *SMALL] if "--resume" in words else MORE.get(command, [])
    done = CliRunner().invoke(llmgym, [command, *words, *more])
    assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)


def test_environments_over_the_wire_are_trained_on(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "services.md").read_text()
    (train,) = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("llmgym train --env OpenEnv")]
    with EnvDoor("PythonTool-v0", port=0) as door:
        words = [word.replace("http://127.0.0.1:8100", door.url) for word in train]
        done = CliRunner().invoke(llmgym, [*words, *MORE["train"], "--out", str(tmp_path / "run")])
        assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)
    (evaluate,) = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("llmgym eval")]
    done = CliRunner().invoke(llmgym, [word.replace(":8000", ":9") for word in evaluate])
    (line,) = done.output.splitlines()
    assert done.exit_code == 2
    assert line.startswith("Error: url: no server of OpenEnv answers at 'http://127.0.0.1:9'")
