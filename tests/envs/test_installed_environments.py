"""Environments that installed packages announce: real packages in a folder, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import llm_gym
def register():
    llm_gym.register("shop/Guess-v0", "llm_gym.envs.guess_number:GuessNumber", kwargs={"high": 7})
"""
PLAYED = """
import llm_gym, gymnasium
print(gymnasium.make("shop/Guess-v0").reset(seed=1)[1]["messages"][0]["content"])
"""


def install(folder: Path, name: str, source: str, entry: str) -> None:
    """A package as an installer leaves it, with one module and one entry point."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llm_gym.environments]\nall = {entry}\n")


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)


@pytest.mark.parametrize(("more", "entry"), [("", "shop:register"), ("register()", "shop")])
def test_a_function_or_a_module_registers_ids(more: str, entry: str, tmp_path: Path) -> None:
    install(tmp_path, "shop", MODULE + more, entry)
    done = python(tmp_path, f"{PLAYED}\nfrom llm_gym.cli.group import llmgym\nllmgym(['envs'])")
    assert "from 1 to 7" in done.stdout
    assert "shop/Guess-v0    of the installed package shop" in done.stdout
    assert done.stderr == ""


def test_a_package_that_fails_is_named_once_and_the_others_are_there(tmp_path: Path) -> None:
    install(tmp_path, "shop", MODULE, "shop:register")
    install(tmp_path, "broken", "raise RuntimeError('no licence')", "broken")
    install(tmp_path, "absent", "", "absent:register")
    done = python(tmp_path, f"{PLAYED}\nfrom llm_gym.envs import resolve\nresolve('GSM8K-v0')")
    assert "from 1 to 7" in done.stdout
    assert done.stderr.count("broken: its environments cannot be registered: RuntimeError: no licence") == 1
    assert done.stderr.count("absent: its environments cannot be registered: AttributeError") == 1


def test_a_package_that_is_imported_first(tmp_path: Path) -> None:
    """It imports us before it can register anything."""
    install(tmp_path, "shop", MODULE, "shop:register")
    done = python(tmp_path, "import shop\nfrom llm_gym.envs import resolve\nprint(resolve('shop/Guess-v0'))")
    assert done.stdout == "shop/Guess-v0\n"
    assert done.stderr == ""
