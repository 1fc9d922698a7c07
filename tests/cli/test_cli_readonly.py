"""Places that cannot be written: one sentence that names them, before any model loads; for root as for anybody.

Root is bound by no permission bits, so the places are mounted read-only, in a mount namespace of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym

LINES = {
    "a run to begin": ("train --out {closed}/new", "out: '{closed}/new' cannot be a run folder"),
    "a run to begin in a folder that is there": (
        "train --out {closed}/empty",
        "out: '{closed}/empty' cannot be a run folder",
    ),
    "a run to go on with": ("train --resume --steps 2 --out {closed}/run", "out: '{closed}/run' cannot be a run"),
    "chats": ("sft --data {closed}/chats.jsonl --out {closed}/new", "out: '{closed}/new' cannot be a run folder"),
    "a teacher": ("distill --teacher {closed}/run --out {closed}/new", "out: '{closed}/new' cannot be a run folder"),
    "stages": ("run {closed}/plan.yaml --out {closed}/new", "out: '{closed}/new' cannot be written"),
    "a measurement": ("eval --episodes 2 --out {closed}/new.json", "--out: '{closed}/new.json' cannot be written"),
    "an old measurement": ("eval --episodes 2 --out {closed}/plan.yaml", "--out: '{closed}/plan.yaml' cannot be"),
    "a folder as file": ("eval --episodes 2 --out {tmp}", "--out: '{tmp}' cannot be written (Is a directory)"),
    "a report": ("view {closed}/run", "report: '{closed}/run/report.html' cannot be written"),
    "a model": ("export {closed}/run {closed}/new", "out: '{closed}/new' cannot be written"),
    "a model that is trained again": (
        "replay {closed}/run --step 1 --out {closed}/new",
        "out: '{closed}/new' cannot be written",
    ),
}
SCRIPT = """
import json, os, sys
from pathlib import Path
from click.testing import CliRunner
from llm_gym.cli.group import llmgym
from llm_gym.envs.tools.sandbox.guest import syscalls

closed, lines = Path(sys.argv[1]), json.loads(sys.argv[2])
if os.geteuid() == 0:
    syscalls.unshare(syscalls.NEWNS)
    syscalls.mount("none", "/", None, syscalls.REC | syscalls.PRIVATE)
    syscalls.mount(str(closed), str(closed), None, syscalls.BIND)
    syscalls.read_only(str(closed))
else:
    for path in (closed, *closed.rglob("*")):
        path.chmod(0o555)
done = [CliRunner().invoke(llmgym, line.split()) for line in lines]
print(json.dumps([(one.exit_code, one.stderr, repr(one.exception)) for one in done]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Of each line its exit status, what it said, and the sentence that it should have said."""
    tmp = tmp_path_factory.mktemp("closed")
    closed = tmp / "closed"
    (closed / "empty").mkdir(parents=True)
    (closed / "chats.jsonl").write_text(json.dumps({"prompt": "1+1?", "completion": "2"}) + "\n")
    (closed / "plan.yaml").write_text("stages: [train: {}]\n")
    small = "steps=1 prompts_per_step=1 group_size=2 sampling.max_tokens=4 eval.episodes=0 checkpoint.every=1"
    words = [word for each in small.split() for word in ("--set", each)]
    done = CliRunner().invoke(llmgym, ["train", "--out", str(closed / "run"), *words])
    assert done.exit_code == 0, done.output
    lines = [line.format(closed=closed, tmp=tmp) for line, _ in LINES.values()]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(closed), json.dumps(lines)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    for path in (closed, *closed.rglob("*")):
        path.chmod(0o755)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    wanted = [sentence.format(closed=closed, tmp=tmp) for _, sentence in LINES.values()]
    return {
        name: (code, err + ("" if err else error), want)
        for name, (code, err, error), want in zip(LINES, found, wanted, strict=True)
    }


@pytest.mark.parametrize("case", LINES)
def test_a_place_that_cannot_be_written_is_one_sentence(case: str, said: dict[str, tuple[int, str, str]]) -> None:
    code, words, want = said[case]
    assert words.startswith(f"Error: {want}"), words
    assert words.count("\n") == 1, "nothing was loaded before"
    assert code == 2
