"""The server's command line and environment, and what is said when it ends; real ones run in tests/heavy."""

from __future__ import annotations

import socket

import pytest

from llm_gym.errors import SettingError
from llm_gym.policies.serving import HOST, environment, flag, free_port, healthy, last_error


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--max-len"]),
        (False, ["--no-max-len"]),
        (None, []),
        (5, ["--max-len", "5"]),
        ("a b", ["--max-len", "a b"]),
        ({"a": [1]}, ["--max-len", '{"a": [1]}']),
    ],
)
def test_flags(value: object, words: list[str]) -> None:
    assert flag("max_len", value) == words


def test_the_environment_is_the_servers_own() -> None:
    found = environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "7", "PYTHONPATH": "/mine"})
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert found["PYTHONPATH"].endswith(":/mine")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in found
    assert environment({"OMP_NUM_THREADS": "1"})["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(SettingError, match=f"--port: cannot use {taken.getsockname()[1]}"):
            free_port(taken.getsockname()[1])
    assert free_port(0) > 0
    assert not healthy("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [
                "(EngineCore pid=7) ERROR [core.py:1] ValueError: No available memory for the cache blocks.",
                "(APIServer pid=1) Traceback (most recent call last):",
                "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "ValueError: No available memory for the cache blocks.",
        ),
        (
            ["api_server.py: error: argument --port: invalid int value: 'x'"],
            "api_server.py: error: argument --port: invalid int value: 'x'",
        ),
        (["loading", "", "Killed", ""], "Killed"),
        ([], "it wrote nothing"),
    ],
)
def test_the_line_that_says_what_went_wrong(lines: list[str], said: str) -> None:
    assert last_error(lines) == said
