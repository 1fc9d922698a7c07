"""`llmgym serve-chat`: a real server, the real client, Ctrl-C; and what the commands refuse before a model loads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym
from llm_gym.core import StopReason
from llm_gym.episode_files import decode

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "llm_gym.cli", "serve-chat", "--port", "0", "--temperature", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline() + process.stdout.readline()
            found = re.search(r"OPENAI_BASE_URL=(\S+),", said)
            assert found, said
            yield found[1], process
        finally:
            process.kill()


def test_a_model_answers_until_ctrl_c_and_every_session_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "said.jsonl"
    with serving("--record", str(record), "--token", "secret") as (url, process):
        with openai.OpenAI(base_url=url, api_key="guess") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=url, api_key="secret") as client:
            chat = [{"role": "user", "content": "What is 15 + 31?"}]
            for _ in range(2):
                answer = client.chat.completions.create(model="m", messages=chat)  # type: ignore[arg-type]
                text = str(answer.choices[0].message.content)
                chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "Sure?"}]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    (line,) = record.read_text(encoding="utf-8").splitlines()
    episode = decode(json.loads(line))
    assert (len(episode.turns), len(episode.trajectories), episode.stop_reason) == (2, 1, StopReason.ANSWERED)
    assert [m["content"] for m in episode.messages] == [m["content"] for m in chat[:4]]


REFUSED = {
    "train --agent nowhere_at_all:solve": "agent.function: cannot import 'nowhere_at_all'",
    "train --agent json:laods": "did you mean 'loads'",
    "train --agent json": "want 'package.module:function'",
    "train --agent json:loads --agent-command cat": "pass one",
    "train --agent-command no-such-program": "no program is found",
    "eval --agent json:laods": "did you mean 'loads'",
    "eval --agent json:loads --policy openai --model m": "gives text only",
    "serve-chat --host 0.0.0.0": "whoever reaches the server can use the model; give --token",
    "serve-chat --policy transfomers": "did you mean 'transformers'",
    "serve-chat --model /no/such/folder": "/no/such/folder",
    "serve-chat --temperature -1": "sampling.temperature: got -1",
    "serve-chat --record /dev/null/x": "--record",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_work_is_one_sentence(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(llmgym, command.split(" "))
    assert done.exit_code == 2, done.output
    assert REFUSED[command] in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
