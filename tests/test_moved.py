"""Modules that people were shown under other names: one more release they are there, and say where they are."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from llm_gym.lazy import MOVED

SHOWN = """
from llm_gym.envs.tools.mcp import MCPTool
from llm_gym.harness.batching import pack
from llm_gym.harness.learner import Learner
from llm_gym.harness.logprobs import token_loss
from llm_gym.harness.losses import LossConfig, Metrics, token_level
from llm_gym.harness.model import export
from llm_gym.harness.optimizers import OptimizerConfig
from llm_gym.harness.rewards import Floats, Rewards
from llm_gym.harness.sft import SFTConfig, sft
from llm_gym.harness.streams import Streams
from llm_gym.harness.trainer import Observer, Trainer
from llm_gym.policies.transformers import TransformersPolicy
from llm_gym.policies.vllm import VLLMPolicy
"""


@pytest.mark.parametrize("old", MOVED)
def test_a_former_name_is_the_module_itself_and_warns(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is now {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert (module.__name__, module.__spec__.name) == (MOVED[old], MOVED[old])


def test_what_the_docs_showed_can_still_be_imported() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SHOWN], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_former_name_runs_as_a_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "llm_gym.envs.tools.mcp_server"], input="", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    assert "llm_gym.envs.tools.mcp_server is now llm_gym.envs.tools.mcp.calculator_server" in run.stderr


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    for package in ("llm_gym", "llm_gym.harness", "llm_gym.harness.model"):
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nosuch'"):
            _ = importlib.import_module(package).nosuch
