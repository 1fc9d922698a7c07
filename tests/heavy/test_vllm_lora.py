"""Adapters of every kind, on every base, with a real vLLM engine: what it is sent is what the learner trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops.observer import Observer

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

FEW = ["prompts_per_step=4", "group_size=8", "eval.episodes=0", "optimizer.lr=1e-3", "steps=2"]


@pytest.mark.parametrize(
    ("kind", "base", "sync", "mode"),
    [
        ("rslora", "float32", "adapter", "adapter"),
        ("dora", "float32", "auto", "merged"),
        ("dora", "float32", "disk", "disk"),
        ("lora", "nf4", "adapter", "adapter"),
        pytest.param("lora", "nf4", "merged", "merged", marks=pytest.mark.soak),
    ],
)
def test_the_engine_serves_what_is_trained(kind: str, base: str, sync: str, mode: str, tmp_path: Path) -> None:
    """In float32 to 1e-4 nats; over a base in 4 bits within what bfloat16 arithmetic explains."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    told: list[str] = []

    class Listens(Observer):
        def on_note(self, text: str) -> None:
            told.append(text)

    sets = ["policy.engine=vllm", "policy.vllm.max_model_len=256", f"policy.sync={sync}", *FEW]
    lora = {"rank": 4, "kind": kind, "base": base, "layers": "-3"}
    rows = Trainer(load(TrainConfig, sets=sets, lora=lora), out=tmp_path, observer=Listens()).train()
    assert any(row["policy/grad_norm"] > 0 for row in rows[1:])
    for row in rows[1:]:
        assert row["sync/mode"] == mode
        assert row["sync/canary_gap_max"] <= (1e-4 if base == "float32" else 1)
        assert row["sync/canary_share"] <= (0.1 if base == "float32" else 0.9)
        assert row["sampler/logprob_gap_mean"] <= (1e-5 if base == "float32" else 0.03)
    assert any("cannot hold this adapter apart" in line for line in told) == (sync == "auto")


@pytest.mark.parametrize(
    ("lora", "sync", "mode"),
    [
        ({"target_modules": ("lm_head", "q_proj")}, "auto", "merged"),
        ({"target_modules": ("embed_tokens", "lm_head"), "kind": "dora"}, "disk", "disk"),
        pytest.param(
            {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
            "restart",
            "restart",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_the_engine_holds_two_matrices_where_an_adapter_makes_two_of_one(
    lora: dict[str, Any], sync: str, mode: str, tmp_path: Path
) -> None:
    """The embedded model's head is its embedding: an engine that were started on it would hold one."""
    told: list[str] = []

    class Listens(Observer):
        def on_note(self, text: str) -> None:
            told.append(text)

    sets = ["policy.engine=vllm", "policy.vllm.max_model_len=256", f"policy.sync={sync}", *FEW]
    rows = Trainer(load(TrainConfig, sets=sets, lora={"rank": 4, **lora}), out=tmp_path, observer=Listens()).train()
    assert any(row["policy/grad_norm"] > 0 for row in rows[1:])
    for row in rows[1:]:
        assert row["sync/mode"] == mode
        assert row["sync/canary_gap_max"] <= 1e-4
        assert row["sampler/logprob_gap_mean"] <= 1e-5
    assert any("become two" in line for line in told)
