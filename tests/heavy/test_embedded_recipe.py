"""The embedded model's recipe, shortened: the same command, a fraction of the steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "embedded_model"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@pytest.mark.soak
def test_the_shortened_recipe_learns(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(RECIPE / "build.py"), "--out", str(out), "--scale", "0.2", "--problems", "128"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in out.iterdir()} >= FILES
    assert vocabulary(out) == vocabulary(ROOT / "llm_gym" / "embedded")
    losses = [json.loads(line)["loss"] for line in (out / "phase1" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.35 * losses[0]
    report = json.loads((out / "evaluation.json").read_text())
    assert report["python/exact_when_calling"] > 0.2  # 0.6 when written: all of a call, operands included
    assert report["python/exact_answer_from_result"] > 0.2  # 0.5
    assert report["addition/greedy_accuracy"] > 0.03  # 0.12; an answer by chance: below 0.01


def vocabulary(folder: Path) -> dict[str, int]:
    model: dict[str, dict[str, int]] = json.loads((folder / "tokenizer.json").read_text())["model"]
    return model["vocab"]
