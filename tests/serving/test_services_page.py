"""docs/services.md: its examples run, and its server; the other commands run in tests/cli/test_cli_documented.py."""

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

import gymnasium as gym
from click.testing import CliRunner

from llm_gym.cli.group import llmgym

PAGE = Path(__file__).parents[2] / "docs" / "services.md"


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


def test_the_command_serves_until_ctrl_c() -> None:
    (serve,) = lines("serve-env")
    assert serve[-2:] == ["--port", "8100"]
    with running([*serve[:-1], "0"]) as url, gym.make("llm_gym/OpenEnv-v0", url=url) as env:
        assert env.reset(seed=1)[1]["tools"]


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
