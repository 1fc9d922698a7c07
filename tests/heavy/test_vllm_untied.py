"""A model whose head is a matrix of its own, with biases, on a real vLLM engine: proof and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import COMBINATIONS, TOLERANCE, nudged, sampling, worst
from tiny_models import contexts, tiny

from llm_gym.models.checksums import checksums

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return tiny("Qwen2", tie_word_embeddings=False, initializer_range=0.2, **sizes)


@pytest.fixture(scope="module")
def policy(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from llm_gym.policies.vllm.policy import VLLMPolicy

    folder: Path = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder)
    engine = VLLMPolicy(folder, dtype="float32", skip_tokenizer_init=True)
    yield engine
    engine.close()


@pytest.mark.parametrize(("temperature", "filters"), COMBINATIONS)
def test_tokens_agree(policy: Any, model: Any, temperature: float, filters: str) -> None:
    prompts, how = contexts(64), sampling(temperature, filters)
    completions = policy.generate(prompts, how, seeds=range(64))
    assert worst(model, prompts, completions, how) <= TOLERANCE


def test_the_proof_sees_one_bit_of_any_tensor_in_the_engine_only(policy: Any, model: Any) -> None:
    tensors = dict(model.state_dict())
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(tensors)
    expected = checksums(tensors.items(), policy.dtype)
    for name, changed in nudged(tensors):
        policy.load(changed.items(), version=1)
        assert policy.differing(expected) == [name]
    policy.load(tensors.items(), version=2)
    assert policy.differing(expected) == []


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_log_probabilities_see_a_changed_head_or_embedding(policy: Any, model: Any, name: str) -> None:
    tensors = dict(model.state_dict())
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    policy.load({**tensors, name: tensors[name] + 0.05 * noise}.items(), version=1)
    prompts, how = contexts(8), sampling(1.0, "off", 32)
    assert worst(model, prompts, policy.generate(prompts, how, seeds=range(8)), how) > 10 * TOLERANCE
    policy.load(tensors.items(), version=2)
    assert worst(model, prompts, policy.generate(prompts, how, seeds=range(8)), how) <= TOLERANCE
