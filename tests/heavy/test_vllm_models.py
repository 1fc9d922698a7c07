"""Models that vLLM serves in ways of its own: experts in one matrix, layers that are not split, no class for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny

from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.model.loading import load_model
from llm_gym.models.checksums import checksums
from llm_gym.tokenizer import load_tokenizer

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**EXPERTS, "mlp_only_layers": [], "norm_topk_prob": True},  # 48 is padded to 64 for vLLM's kernels
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 64},
    "Olmo2": {},
    "GPTNeoX": {},
}
SETS = [
    *("policy.engine=vllm", "policy.vllm.max_model_len=256", "sampling.max_tokens=12", "steps=2"),
    *("prompts_per_step=2", "group_size=4", "eval.episodes=0", "optimizer.lr=1e-2", "optimizer.warmup_steps=0"),
    "loss.entropy_weight=0.1",  # random models are never right: nothing else has a gradient
]


class Listens(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []

    def on_note(self, text: str) -> None:
        self.told.append(text)


def trainer(family: str, tmp_path: Path, *, observer: Any = None, **changes: Any) -> Trainer:
    """Of a random model with the embedded model's tokenizer, with vLLM in this process."""
    tokenizer, sizes = load_tokenizer(None), SIZES | FAMILIES[family] | changes
    if family == "GPTNeoX":  # it has neither, and vLLM would believe them
        sizes |= {"num_key_value_heads": 2, "head_dim": None}
    model = tiny(family, tie_word_embeddings=False, vocab_size=len(tokenizer), **sizes)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return Trainer(
        load(TrainConfig, sets=[*SETS, f"model={tmp_path / 'model'}"]), out=tmp_path / "run", observer=observer
    )


def proven(rows: list[dict[str, Any]], mode: str = "tensors") -> None:
    """Weights changed in every step, and arrived."""
    assert len(rows) == 3
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0
        assert row["sync/mode"] == mode
        assert row["sync/canary_gap_max"] <= 1e-4
        assert row["sampler/logprob_gap_max"] <= 1e-4


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A run that has not begun; the last test trains it, which ends its engine."""
    run = trainer("Qwen3Moe", tmp_path_factory.mktemp("experts"))
    yield run
    run.sync.close()


def by_expert(model: Any) -> dict[str, torch.Tensor]:
    """The weights by the names that `save_pretrained` writes: a matrix for each expert."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, model.state_dict()))


@pytest.mark.parametrize("form", ["in memory", "as saved"])
def test_the_proof_names_the_expert_that_differs(form: str, experts: Trainer) -> None:
    policy, model = experts.policy, load_model(experts.config.model)
    tensors = dict(model.state_dict()) if form == "in memory" else by_expert(model)
    expected = checksums(tensors.items(), policy.dtype)
    policy.load(tensors.items(), version=10)
    assert policy.differing(expected) == []
    layer = "model.layers.1.mlp"
    named = {f"{layer}.gate.weight": 1, "lm_head.weight": 1}
    if form == "in memory":
        named |= {f"{layer}.experts.gate_up_proj": 1, f"{layer}.experts.down_proj": 1}
    else:
        named |= {f"{layer}.experts.3.down_proj.weight": 1, f"{layer}.experts.2.up_proj.weight": 2}
    for name, count in named.items():
        changed = tensors[name].clone()
        flat = changed.view(-1)
        flat[len(flat) // 2] = torch.nextafter(flat[len(flat) // 2], torch.tensor(torch.inf))
        policy.load({**tensors, name: changed}.items(), version=11)
        wrong = policy.differing(expected)
        assert name in wrong
        assert len(wrong) == count, "two matrices of one expert are held as one"
    policy.load(tensors.items(), version=0)
    assert policy.differing(expected) == []


def test_experts_train_with_weights_proven_after_every_step(experts: Trainer) -> None:
    proven(experts.train())


def test_where_sending_corrupts_the_engine_a_run_restarts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM does by itself: experts that are sent again stay unpacked. It is found out when the run starts."""
    from llm_gym.policies.vllm import worker

    monkeypatch.setattr(worker, "pack_experts_again", lambda model: None)
    listens = Listens()
    run = trainer("Qwen3Moe", tmp_path, observer=listens, moe_intermediate_size=32)
    run.sync.close()
    assert run.sync.mode == "restart"
    (line,) = listens.told
    assert line.startswith(
        "policy.sync: 'restart', because an engine that is sent weights goes wrong here: sync 'tensors'"
    )
    assert "disagree by" in line


def test_layers_that_are_not_split_are_read_back(tmp_path: Path) -> None:
    run = trainer("OPT", tmp_path)
    proven(run.train())


@pytest.mark.parametrize("family", ["Olmo2", "GPTNeoX"])
def test_a_model_without_a_class_of_vllms_own_trains_in_this_process(tmp_path: Path, family: str) -> None:
    """vLLM would decorate transformers' class in place, the learner's."""
    kind = getattr(transformers, f"{family}Model")
    before = kind.__bases__, kind.__init__, kind.__call__
    run = trainer(family, tmp_path)
    worker = run.policy.thread.engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker.get_model()).__name__.startswith("Transformers")
    assert (kind.__bases__, kind.__init__, kind.__call__) == before
    alone = load_model(str(run.config.model))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(alone(input_ids=ids).logits, run.model(input_ids=ids).logits)
    proven(run.train())
