"""Adapters on a real vLLM engine, brought in memory, and a model whose head is a matrix of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from engine_checks import (
    COMBINATIONS,
    TOLERANCE,
    contexts,
    nudged,
    sampling,
    until_tokens,
    worst,
    worst_by_version,
)

from llm_gym.core import Completion
from llm_gym.errors import PolicyError
from llm_gym.harness.model.loading import load_model
from llm_gym.models.checksums import checksums

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")
RANK, ALPHA = 6, 10  # neither a rank that vLLM has kernels for nor a scaling that is exact


@pytest.fixture(scope="module")
def policy() -> Iterator[Any]:
    from llm_gym.policies.vllm.policy import VLLMPolicy

    engine = VLLMPolicy(max_context=512, dtype="float32", lora_rank=RANK)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def base() -> Any:
    return load_model(None)


def adapted(seed: int) -> Any:
    """The embedded model with a random adapter on every linear layer."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model, generator = peft.get_peft_model(load_model(None), config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapter(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return peft.get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def test_without_an_adapter_it_is_the_base_model(policy: Any, base: Any) -> None:
    prompts, how = contexts(16), sampling(1.0, "off", 32)
    assert worst(base, prompts, policy.generate(prompts, how, seeds=range(16)), how) <= TOLERANCE
    assert policy.differing(checksums(base.state_dict().items(), policy.dtype)) == []


@pytest.mark.parametrize(
    ("temperature", "filters"),
    [pytest.param(*each, marks=[pytest.mark.soak] if each[1] == "off" else []) for each in COMBINATIONS],
)
def test_4096_tokens_agree_after_a_hot_load(policy: Any, base: Any, temperature: float, filters: str) -> None:
    model, prompts, how = adapted(1), contexts(64), sampling(temperature, filters)
    tensors, config = adapter(model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    policy.load_adapter(tensors.items(), config, version=1)
    completions = policy.generate(prompts, how, seeds=range(64))
    assert sum(len(c.tokens) for c in completions) == 4096
    assert worst(model, prompts, completions, how) <= TOLERANCE
    assert worst(base, prompts, completions, how) > 0.1
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)  # vLLM scales B: its own copy


def test_adapters_arrive_in_flight_and_are_dated_to_the_token(policy: Any) -> None:
    models = {1: adapted(1), 2: adapted(2), 3: adapted(3)}
    policy.load_adapter(adapter(models[1])[0].items(), adapter(models[1])[1], version=1)
    prompts, hows = contexts(24), [sampling(*COMBINATIONS[i % len(COMBINATIONS)], max_tokens=40) for i in range(24)]

    async def main() -> list[Completion]:
        jobs = [policy.complete(c, how, seed=i) for i, (c, how) in enumerate(zip(prompts, hows, strict=True))]
        running = [asyncio.ensure_future(job) for job in jobs]
        for version in (2, 3):
            await until_tokens(policy, 10)
            tensors, config = adapter(models[version])
            await asyncio.to_thread(policy.load_adapter, tensors.items(), config, version=version)
        return await asyncio.gather(*running)

    completions = asyncio.run(main())
    assert all(len(c.updates) == 2 for c in completions)
    assert worst_by_version(models, prompts, completions, hows) <= TOLERANCE
    assert worst_by_version(models, prompts, completions, hows, shift=1) > 0.1


def test_the_proof_sees_one_bit_of_any_a_and_b_in_the_engine_only(policy: Any, base: Any) -> None:
    tensors, config = adapter(adapted(1))
    expected = checksums([*base.state_dict().items(), *tensors.items()], policy.dtype)
    for name, changed in nudged(tensors):
        policy.load_adapter(changed.items(), config, version=1)
        assert policy.differing(expected) == [name]
    policy.load_adapter(tensors.items(), config, version=1)
    assert policy.differing(expected) == []


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_log_probabilities_see_a_changed_a_or_b(policy: Any, half: str) -> None:
    model = adapted(1)
    tensors, config = adapter(model)
    name = next(n for n in tensors if half in n)
    policy.load_adapter({**tensors, name: tensors[name] + 0.05}.items(), config, version=1)
    prompts, how = contexts(8), sampling(1.0, "off", 32)
    assert worst(model, prompts, policy.generate(prompts, how, seeds=range(8)), how) > 10 * TOLERANCE


def test_the_proof_sees_another_scaling_and_an_adapter_overwritten_in_place(policy: Any) -> None:
    tensors, config = adapter(adapted(1))
    expected = checksums(tensors.items(), policy.dtype)
    policy.load_adapter(tensors.items(), config, version=1)

    def overwrite(worker: Any) -> None:
        module = worker.model_runner.lora_manager._adapter_manager.modules["model.layers.1.mlp.gate_up_proj"]
        module.lora_b_stacked[1][0, 0, 0, 0] *= 2

    policy.thread.call(lambda engine: engine.collective_rpc(overwrite)).result()
    assert policy.differing(expected) == ["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def test_whole_weights_empty_the_adapter(policy: Any, base: Any) -> None:
    tensors, config = adapter(adapted(1))
    policy.load_adapter(tensors.items(), config, version=1)
    policy.load(base.state_dict().items(), version=2)
    prompts, how = contexts(8), sampling(1.0, "off", 32)
    assert worst(base, prompts, policy.generate(prompts, how, seeds=range(8)), how) <= TOLERANCE
    assert set(policy.differing(checksums(tensors.items(), policy.dtype))) == set(tensors)


def test_an_adapter_of_too_high_a_rank_is_refused_and_the_old_one_stays(policy: Any) -> None:
    old = adapted(1)
    policy.load_adapter(adapter(old)[0].items(), adapter(old)[1], version=1)
    big = peft.get_peft_model(load_model(None), peft.LoraConfig(r=32, target_modules=["q_proj"]))
    with pytest.raises(PolicyError, match="rank"):
        policy.load_adapter(adapter(big)[0].items(), adapter(big)[1], version=2)
    assert policy.version == 1
    assert policy.differing(checksums(adapter(old)[0].items(), policy.dtype)) == []
