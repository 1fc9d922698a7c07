"""`llmgym serve` before anything starts; real servers run in tests/heavy."""

from __future__ import annotations

import socket

import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym
from llm_gym.cli.serve import important


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(llmgym, ["serve", *args])
    return done.exit_code, done.output


def test_it_is_a_command() -> None:
    code, said = run("--help")
    assert code == 0
    assert "127.0.0.1 only" in " ".join(said.split())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu7", "127.0.0.1.example.org"])
def test_others_than_this_machine_need_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_GYM_TOKEN", raising=False)
    code, said = run("--host", host)
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"Error: --host: got '{host}' without a token")
    assert "--token SECRET or set LLM_GYM_TOKEN" in line


@pytest.mark.parametrize("given", [["--token", "s3cret"], []])
def test_with_a_token_the_next_thing_is_looked_at(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_GYM_TOKEN", "s3cret")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = run("--host", "0.0.0.0", "--port", str(port), *given)
    assert (code, said.startswith(f"Error: --port: cannot use {port} on 0.0.0.0")) == (2, True)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    code, said = run("--host", "192.0.2.1", "--token", "s3cret")
    (line,) = said.splitlines()
    assert code == 2
    assert line.startswith("Error: --port: cannot use 8000 on 192.0.2.1")


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = run("--port", str(port))
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"Error: --port: cannot use {port}")


def test_the_terminal_shows_what_is_important() -> None:
    """A server in bfloat16 warns of each tensor of each update: thousands of lines; any of tied heads."""
    assert important("(EngineCore pid=7) ERROR 11-30 02:00:00 [core.py:7] it died")
    assert important("(Worker pid=7) WARNING 11-30 02:00:00 [x.py:7] little memory")
    warned = "WARNING 11-30 02:00:00 [utils.py:334] Attempted to load weight model.norm.weight with dtype torch.float32"
    assert not important(warned)
    assert not important("WARNING 11-30 02:00:00 [layerwise.py:266] ParallelLMHead: Failed to load weights")
    assert not important("INFO 11-30 02:00:00 [x.py:7] ready")
