"""`llmgym doctor` with a real vLLM engine: one that serves the model, and one that serves another."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym

pytest.importorskip("vllm")
pytestmark = pytest.mark.heavy
WORDS = ["doctor", "--engine", "vllm", "--json"]


def parity(said: str) -> Any:
    """What was found by comparing the engine with the learner."""
    (found,) = (finding for finding in json.loads(said)["findings"] if finding["check"] == "parity")
    assert found["data"]["tokens"] >= 512
    return found


def test_an_engine_that_serves_the_model() -> None:
    """In a process of its own: its output is JSON, and nothing of what vLLM prints while it starts."""
    done = subprocess.run([sys.executable, "-m", "llm_gym.cli", *WORDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = parity(done.stdout)
    assert found["verdict"] == "ok"
    assert found["data"]["worst"] < 1e-4
    assert [line.partition(",")[0] for line in done.stderr.splitlines()][1] == "starting vllm"


@pytest.mark.soak
def test_an_engine_that_serves_another() -> None:
    done = CliRunner().invoke(llmgym, [*WORDS, "--set", "policy.vllm.hf_overrides={rms_norm_eps: 0.01}"])
    assert done.exit_code == 1, done.output
    found = parity(done.stdout)
    assert found["verdict"] == "off"
    assert found["data"]["worst"] >= 1e-4
