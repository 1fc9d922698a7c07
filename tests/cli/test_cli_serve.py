"""`llmgym serve` before anything starts; real servers run in tests/heavy."""

from __future__ import annotations

import socket

from click.testing import CliRunner

from llm_gym.cli.group import llmgym


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(llmgym, ["serve", *args])
    return done.exit_code, done.output


def test_it_is_a_command() -> None:
    code, said = run("--help")
    assert code == 0
    assert "127.0.0.1 only" in " ".join(said.split())


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = run("--port", str(port))
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"Error: --port: cannot use {port}")
