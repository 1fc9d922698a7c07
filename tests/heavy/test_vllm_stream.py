"""Rollouts ahead of the learner on real vLLM engines: every token is of the version that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_gym.harness import TrainConfig, Trainer
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.policies.vllm_server.process import ServerProcess

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

STEPS, BOUND = 5, 2


def run(out: Path, **policy: Any) -> None:
    config = TrainConfig(
        steps=STEPS,
        prompts_per_step=4,
        group_size=4,
        sampling={"max_tokens": 48, "stop_token_ids": ()},  # long enough for an update to come meanwhile
        optimizer={"lr": 1e-3, "warmup_steps": 0},
        eval={"episodes": 8, "every": 2},
        checkpoint={"every": 1, "keep": 0},
        stream={"max_staleness": BOUND},
        policy=policy,
    )
    Trainer(config, out=out, observer=object()).train()


def gap(model: Any, context: Any, completion: Any, version: int) -> float:
    """The greatest difference (nats) of a token of this version from the model."""
    own = np.flatnonzero(completion.versions == version)
    ids = torch.from_numpy(np.concatenate([context, completion.tokens])).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(context) - 1 : -1].double()
    said = logits.log_softmax(-1).gather(-1, ids[0, len(context) :, None])[:, 0].numpy()
    return float(np.abs(said - completion.logprobs)[own].max(initial=0.0))


def check(out: Path) -> None:
    folder = RunFolder(out)
    turns = [
        (step, t) for step in range(1, STEPS + 1) for e in folder.read_episodes(f"step_{step:06d}") for t in e.turns
    ]
    ages = {step - 1 - int(v) for step, turn in turns for v in turn.completion.versions}
    assert ages <= set(range(BOUND + 1))
    assert max(ages) == BOUND
    for version in range(STEPS):
        model = load_model(out / "checkpoints" / f"step_{version:06d}" if version else None)
        worst = max(gap(model, turn.prompt, turn.completion, version) for _, turn in turns)
        assert worst < 1e-3, version
    evaluated = [e for step in (2, 4) for e in folder.read_episodes(f"eval_{step:06d}")]
    assert not any(e.stop_reason.failed for e in evaluated)
    assert {int(v) for e in evaluated for t in e.turns for v in t.completion.versions} == {2, 4}
    assert folder.metrics()[-1]["stream/ended"] == 4 * STEPS


def test_in_process(tmp_path: Path) -> None:
    run(tmp_path / "run", engine="vllm", vllm={"max_model_len": 256, "kv_cache_memory_bytes": 1 << 28})
    check(tmp_path / "run")


@pytest.mark.soak  # in CI two processes share one: test_nproc_engines.py
def test_behind_a_server(tmp_path: Path) -> None:
    server = ServerProcess(settings={"dtype": "float32", "max_model_len": 256})
    try:
        server.wait()
        run(tmp_path / "run", servers=(server.url,))
    finally:
        server.stop()
    check(tmp_path / "run")
