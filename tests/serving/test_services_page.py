"""docs/services.md: its examples run, and its commands work as they stand there."""

from __future__ import annotations

import doctest
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner

from llm_gym.cli.group import llmgym

PAGE = Path(__file__).parents[2] / "docs" / "services.md"
SMALL = ["prompts_per_step=2", "group_size=2", "eval.episodes=4", "sampling.max_tokens=8", "steps=1"]


def lines(command: str) -> list[list[str]]:
    """The words of each command line of the page that begins so, `llmgym` left out."""
    return [shlex.split(line)[1:] for line in PAGE.read_text().splitlines() if line.startswith(f"llmgym {command} ")]


@contextmanager
def running(words: list[str]) -> Iterator[str]:
    """What a server's first line says is its URL; ended as by Ctrl-C."""
    command = [sys.executable, "-m", "llm_gym.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r" on (http://\S+);", server.stdout.readline())
        try:
            assert found is not None, server.communicate(timeout=60)
            yield found[1]
        finally:
            server.send_signal(signal.SIGINT)
            _, said = server.communicate(timeout=60)
    assert (server.returncode, said) == (130, "")


def test_the_examples_run() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 7
    assert result.failed == 0


def test_the_commands_of_a_server_and_its_trainer(tmp_path: Path) -> None:
    (serve,), (train,) = lines("serve-env"), lines("train")
    assert serve[-2:] == ["--port", "8100"]
    with running([*serve[:-1], "0"]) as url:
        words = [word.replace("http://127.0.0.1:8100", url) for word in train]
        sets = [word for setting in SMALL for word in ("--set", setting)]
        done = CliRunner().invoke(llmgym, [*words, *sets, "--out", str(tmp_path / "run")])
        assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)
    (evaluation,) = lines("eval")
    done = CliRunner().invoke(llmgym, [word.replace(":8000", ":9") for word in evaluation])
    (line,) = done.output.splitlines()
    assert done.exit_code == 2
    assert line.startswith("Error: url: no server of OpenEnv answers at 'http://127.0.0.1:9'")


def test_what_cannot_be_served_is_one_sentence() -> None:
    for words, said in (
        (["GuessNumber-v1"], "did you mean 'GuessNumber-v0'?"),
        (["GuessNumber-v0", "--env-arg", "hgih=3"], "did you mean 'high'?"),
        (["GuessNumber-v0", "--host", "0.0.0.0"], "got '0.0.0.0' without a token, but whoever reaches the server can"),
        (["CartPole-v1"], "want a TextEnv"),
    ):
        done = CliRunner().invoke(llmgym, ["serve-env", *words], env={"LLM_GYM_TOKEN": None})
        (line,) = done.output.splitlines()
        assert (done.exit_code, line[:7], said in line) == (2, "Error: ", True), line
