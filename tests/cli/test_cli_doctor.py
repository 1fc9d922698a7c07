"""`llmgym doctor`: measured verdicts, on engines that agree, that do not, and that are not there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console

from llm_gym.cli.doctor import progress, show
from llm_gym.cli.group import llmgym
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.doctor import CHECKS, Finding, Setting
from llm_gym.policies import ENGINES
from llm_gym.policies.builtin.policy import TransformersPolicy


def doctor(*words: str) -> Result:
    return CliRunner().invoke(llmgym, ["doctor", "--tokens", "512", *words])


def parities(result: Result) -> dict[str, dict[str, Any]]:
    findings = json.loads(result.stdout)["findings"]
    return {finding["what"]: finding for finding in findings if finding["check"] == "parity"}


class Crooked(TransformersPolicy):
    """The built-in engine on a copy of the model in which one norm is a little off."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(model, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            self.model.model.norm.weight.mul_(1.001)  # type: ignore[union-attr, operator]


class Blind(Crooked):
    """The same, but it samples from nothing at all."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(model)
        with torch.no_grad():
            self.model.model.norm.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]


@pytest.fixture
def crooked(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (Crooked, Blind):
        monkeypatch.setitem(ENGINES, engine.__name__.lower(), f"{__name__}:{engine.__name__}")


def test_servers_that_all_episodes_share_are_named(tmp_path: Path) -> None:
    """No server is started, and nothing else has to be looked at."""
    own = tmp_path / "servers.json"
    own.write_text(json.dumps({"mcpServers": {"notes": {"command": "notes"}, "far": {"url": "https://far.example"}}}))
    config = TrainConfig(env="MCPTool-v0", env_args={"servers": str(own)})
    notes, far = CHECKS["servers"](Setting(config, ()))
    assert (notes.what, notes.found, notes.verdict) == ("notes", "one for each episode", "ok")
    assert (far.what, far.found, far.verdict) == ("far", "at https://far.example", "note")
    assert "one for all episodes, so that one can see what another did" in far.advice
    (none,) = CHECKS["servers"](Setting(TrainConfig(), ()))
    assert (none.found, none.verdict) == ("none named by the settings", "ok")
    (bad,) = CHECKS["servers"](Setting(TrainConfig(env="MCPTool-v0", env_args={"servers": "nowhere.json"}), ()))
    assert (bad.verdict, bad.advice.partition(":")[0]) == ("off", "servers")


def test_the_built_in_engine_agrees_with_the_learner() -> None:
    result = doctor("--engine", "transformers", "--json")
    assert result.exit_code == 0, result.output
    found = parities(result)["transformers"]
    assert found["verdict"] == "ok"
    assert found["data"]["tokens"] >= 512
    assert 0 < found["data"]["mean"] < found["data"]["worst"] < 1e-4
    assert {finding["check"] for finding in json.loads(result.stdout)["findings"]} == CHECKS.keys()


def test_an_engine_that_is_a_little_off_is_seen(crooked: None) -> None:
    result = doctor("--engine", "crooked", "--engine", "transformers", "--json")
    assert result.exit_code == 1
    found = parities(result)
    assert [found[name]["verdict"] for name in ("crooked", "transformers")] == ["off", "ok"]
    assert "off-policy" in found["crooked"]["advice"]
    assert found["crooked"]["data"]["worst"] > 1e-4


def test_an_engine_that_fails_is_a_finding(crooked: None) -> None:
    result = doctor("--engine", "blind")
    assert result.exit_code == 1, result.output
    assert "blind cannot serve this model here" in result.stdout
    assert "Traceback" not in result.output


def test_the_settings_are_those_of_a_run() -> None:
    found = parities(doctor("--engine", "transformers", "--json", "--set", "sampling.temperature=0.5"))
    assert found["transformers"]["verdict"] == "ok"
    for words, said in (
        (["--engine", "vlm"], "did you mean 'vllm'"),
        (["--set", "polcy.engine=vllm"], "polcy"),
        (["--model", "no/such/model/anywhere"], "no/such/model/anywhere"),
    ):
        result = doctor(*words)
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_without_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; from llm_gym.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--tokens", "64"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'llm-gym[vllm]'" in done.stdout
    parity = done.stdout[done.stdout.index("parity") :]
    assert "transformers" in parity
    assert "vllm" not in parity.partition("note:")[0]
    assert done.stderr.splitlines()[-1].startswith("transformers: comparing 64 tokens")


def shown(*found: Finding) -> str:
    screen = io.StringIO()
    show(found, Console(file=screen, width=100, color_system=None, force_terminal=False))
    return screen.getvalue()


def test_problems_are_said_in_words_below_the_table() -> None:
    text = shown(
        Finding("packages", "torch", "2.13"),
        Finding("packages", "peft", "not installed", "off", "peft is not installed: install it."),
        Finding("machine", "threads", "8", "note", "Eight are many."),
    )
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert rows[0] == ["packages", "torch", "2.13"]
    assert rows[1] == ["peft", "not", "installed", "OFF"]
    assert rows[2] == ["machine", "threads", "8", "note"]
    assert text.index("OFF: peft is not installed: install it.") < text.index("note: Eight are many.")


def test_a_line_says_what_is_being_done() -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        with progress(Console(file=screen, force_terminal=terminal, width=80)) as tell:
            tell("starting vllm")
        assert "starting vllm ..." in screen.getvalue()
        assert ("\x1b[?25h" in screen.getvalue()) == terminal, "the cursor is given back"


def test_what_is_hushed_is_not_said_later_either() -> None:
    """What an engine printed waits in a buffer where the output is a pipe, and must not come out before the report."""
    code = (
        "import sys; from llm_gym.cli.doctor import _hushed\n"
        "with _hushed() as error: print('loud'); print('loud', file=sys.stderr); print('told', file=error)\n"
        "print('{}')"
    )
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=buffered)
    assert (done.stdout, done.stderr) == ("{}\n", "told\n")
