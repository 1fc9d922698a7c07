"""`llmgym doctor` with a real vLLM engine: one that serves the model, and one that serves another."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("words", "verdict"), [([], "ok"), (["--set", "policy.vllm.hf_overrides={rms_norm_eps: 0.01}"], "off")]
)
def test_a_real_engine(words: list[str], verdict: str) -> None:
    command = [sys.executable, "-m", "llm_gym.cli", "doctor", "--engine", "vllm", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (verdict == "off"), done.stderr
    said = json.loads(done.stdout)  # and nothing of what vLLM prints while it starts
    (found,) = (finding for finding in said["findings"] if finding["check"] == "parity")
    assert found["verdict"] == verdict
    assert found["data"]["tokens"] >= 512
    assert (found["data"]["worst"] < 1e-4) == (verdict == "ok")
    assert [line.partition(",")[0] for line in done.stderr.splitlines()][1] == "starting vllm"
