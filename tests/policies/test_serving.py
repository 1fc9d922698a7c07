"""The server's command line and environment, and what is said when it ends; real ones run in tests/heavy."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sandbox_tiers import within

from llm_gym.access import HOST
from llm_gym.errors import ConfigError, SettingError
from llm_gym.policies.vllm_server import process
from llm_gym.policies.vllm_server.process import ServerProcess, environment, flag, healthy, last_error, reserved


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


@pytest.mark.skipif(find_spec("vllm") is None, reason="of the installed vLLM's arguments")
def test_nothing_is_outside_the_gate() -> None:
    """vLLM puts each middleware around those before it."""
    line = process.command("a/model", 1, {"middleware": "my.own"}, "0.0.0.0")
    named = [after for word, after in itertools.pairwise(line) if word == "--middleware"]
    assert named == ["my.own", process.GATE]
    assert line[line.index("--host") + 1] == "0.0.0.0"
    module, _, name = process.GATE.rpartition(".")
    assert inspect.isclass(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", ["host", "port", "api_key"])
def test_what_has_an_option_of_its_own(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--set: {name} is set by llmgym; use --"):
        ServerProcess(settings={name: "x"})


def test_the_token_and_the_folders_reach_the_server_and_go_with_it(running) -> None:
    """By the environment: a command line can be read by everybody."""
    heard: list[str] = []
    script = "import os, time; print(os.environ['LLM_GYM_TOKEN'], os.environ['LLM_GYM_UPLOADS'], flush=True); time.sleep(600)"
    with running(script, echo=heard.append, token="s3cret") as server:
        assert within(60, lambda: bool(heard))
        token, named = heard[0].split()
        folders = [Path(name) for name in named.split(os.pathsep)]
        assert token == "s3cret"
        assert len(folders) == 2
        assert all(folder.is_dir() for folder in folders)
        assert "s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert not any(folder.exists() for folder in folders)


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
            reserved(taken.getsockname()[1])
    assert not healthy("http://127.0.0.1:1")


def test_a_port_is_held_for_the_server_alone() -> None:
    """A server takes ten seconds until it asks for its port, and others look for free ones meanwhile."""
    with reserved(0) as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
        assert not healthy(f"http://{HOST}:{port}")
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM's
            server.bind((HOST, port))
            server.listen()
            with socket.create_connection((HOST, port), timeout=60), pytest.raises(SettingError):
                reserved(port)
        reserved(port).close()


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerProcess]:
    """`running(script)`: a process of ours in the place of vLLM's server."""

    def start(script: str, **options: Any) -> ServerProcess:
        monkeypatch.setattr(process, "command", lambda *_: [sys.executable, "-c", script])
        return ServerProcess(**options)

    return start


def test_what_ends_while_starting_is_heard_to_the_end_and_leaves_nobody(running) -> None:
    """Its engine may outlive it, with the pipe in its hand."""
    server = running(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('ValueError: no room')"
    )
    with pytest.raises(SettingError, match="ended while starting: ValueError: no room"):
        server.wait()
    assert not process.running(server.pid)
    assert not server.reader.is_alive()
    server.stop()


def test_what_a_signal_leaves_in_its_temporary_folder_goes_with_it(running) -> None:
    """vLLM's processes meet in a file there, which only an orderly end removes."""
    heard: list[str] = []
    script = (
        "import tempfile, time; f = tempfile.gettempdir(); open(f + '/vllm_dist_1', 'w').close(); "
        "print(f, flush=True); time.sleep(600)"
    )
    with running(script, echo=heard.append):
        assert within(60, lambda: bool(heard))
        assert (Path(heard[0]) / "vllm_dist_1").exists()
    assert Path(heard[0]).name.startswith("llmgym-")
    assert not Path(heard[0]).exists()


@pytest.mark.skipif(find_spec("vllm") is None or torch.cuda.is_available(), reason="of a server on a CPU")
def test_without_a_gpu_it_computes_in_float32() -> None:
    """The learner does; the embedded model is saved in bfloat16, where they would differ by half a nat."""

    def dtype(**settings: str) -> str:
        line = process.command("a/model", 1, settings)
        return line[line.index("--dtype") + 1]

    assert dtype() == "float32"
    assert dtype(dtype="bfloat16") == "bfloat16"


def test_a_server_that_nobody_listens_to_is_not_held_up(running) -> None:
    def echo(line: str) -> None:
        raise BrokenPipeError

    with running("for _ in range(2000): print(100 * 'x')", echo=echo) as server:  # more than a pipe holds
        assert within(60, server.ended)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells nobody elsewhere")
def test_a_server_whose_parent_died_before_it_asked_to_be_told_does_not_start() -> None:
    for parent, status in ((os.getpid(), 0), (1 << 30, 1)):
        start = functools.partial(process.die_with, parent)
        assert subprocess.run([sys.executable, "-c", ""], preexec_fn=start).returncode == status


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
