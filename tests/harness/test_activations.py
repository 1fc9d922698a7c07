"""Recomputed and offloaded activations: the gradient keeps its bits, and what is kept shrinks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import gradients, llama, qwen3, row, sample, samples
from torch.autograd.graph import saved_tensors_hooks

from llm_gym.errors import ConfigError
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model import checkpointing as saving
from llm_gym.harness.model import prefix_attention
from llm_gym.harness.model.checkpointing import Keep, elsewhere
from llm_gym.harness.model.layers import decoder_layers
from llm_gym.harness.model.loading import LoraConfig, prepare
from llm_gym.harness.model.memory import MemoryConfig, apply_memory_config, check_memory
from llm_gym.harness.types import Batch
from llm_gym.policies.builtin.policy import TransformersPolicy

KINDS: dict[str, Any] = {"whole": None, "lora": LoraConfig(rank=4)}
LAYERS = {"num_hidden_layers": 4}


def batches() -> dict[str, Batch]:
    """Plain packed rows, and a group that shares its prompt."""
    rows = [row(n, 7, prompt=6) for n in (20, 12, 25, 9)]
    for other in rows[1:]:
        other.tokens[:6] = rows[0].tokens[:6]
    group = [sample(r, a, i) for i, (r, a) in enumerate(zip(rows, (1.0, -0.5, 0.3, -1.0), strict=True))]
    return {"packed": pack(samples([24, 6, 17, 9]), max_tokens=40), "shared": pack(group, max_tokens=200, share=True)}


def model_of(kind: str, memory: MemoryConfig | None = None) -> Any:
    torch.manual_seed(3)
    model = prepare(qwen3(dtype=torch.float64, **LAYERS), lora=KINDS[kind], memory=memory)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def gradient(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    learner = Learner(model)
    for micro in batch.micro:
        learner.backward(micro, 1.0)
    return gradients(model)


def runs(model: Any, batch: Batch) -> int:
    """How many layers were run, forward and backward."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1

    learner = Learner(model)
    handles = [layer.input_layernorm.register_forward_hook(hook) for layer in decoder_layers(model)]
    learner.backward(batch.micro[0], 1.0)
    for handle in handles:
        handle.remove()
    return count


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_bits(kind: str, layout: str, every: int) -> None:
    """Adapters above a frozen embedding included: reentrant checkpointing would give them nothing."""
    batch = batches()[layout]
    want = gradient(model_of(kind), batch)
    got = gradient(model_of(kind, MemoryConfig(checkpointing=every)), batch)
    assert got.keys() == want.keys()
    assert got
    assert all(torch.equal(g, want[n]) for n, g in got.items())
    assert max(float(g.abs().max()) for g in got.values()) > 1e-4


def test_kernels_may_be_tried_out_within_a_layer_that_is_run_again() -> None:
    """As they are in a run whose first forward has gradients and is in bfloat16."""
    model = model_of("whole", MemoryConfig(checkpointing=1)).float()
    learner = Learner(model, OptimizerConfig(dtype="bfloat16"))
    prefix_attention.tried.cache_clear()
    learner.backward(batches()["packed"].micro[0], 1.0)
    assert prefix_attention.tried.cache_info().misses == 1
    assert len(gradients(model)) > 0


@pytest.mark.parametrize(("every", "layers"), [(0, 4), (1, 8), (2, 6), (3, 5)])
def test_every_so_many_layers_one_runs_again(every: int, layers: int) -> None:
    batch = batches()["shared"]
    assert batch.micro[0].parents
    assert runs(model_of("whole", MemoryConfig(checkpointing=every)), batch) == layers


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_gives_the_same_bits(
    kind: str, layout: str, checkpointing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved leaves by `away` and comes back; weights stay where they are."""
    monkeypatch.setattr(saving, "LEAST", 0)
    batch = batches()[layout]
    want = gradient(model_of(kind), batch)
    model = model_of(kind)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    moved: list[int] = []

    def away(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.untyped_storage().data_ptr() not in weights
        moved.append(tensor.numel())
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(saving, "to_host", away)
    saving.wrap_layers(decoder_layers(model), checkpointing=checkpointing, offload=True)
    got = gradient(model, batch)
    assert moved
    assert all(torch.equal(g, want[n]) for n, g in got.items())


def test_offloaded_tensors_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LEAST", 0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with elsewhere(layer, lambda t: 2 * t):
        y = (x * x).sum() + layer(x).sum()
    y.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 4 * x + layer.weight.sum(0))  # what came back is what was away, and the weights


def kept(memory: MemoryConfig) -> int:
    """Bytes that one micro-batch's forward keeps for its backward."""
    learner = Learner(prepare(qwen3(**LAYERS), memory=memory))
    seen: dict[int, int] = {}

    def pack_(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
    with saved_tensors_hooks(pack_, lambda tensor: tensor):
        learner.backbone.hidden(pack(samples([100, 90]), max_tokens=200).micro[0])
    return sum(size for where, size in seen.items() if where not in weights)


def test_checkpointing_keeps_less() -> None:
    whole, half, full = (kept(MemoryConfig(checkpointing=every)) for every in (0, 2, 1))
    assert full < 0.2 * whole
    assert full < half < 0.7 * whole


def test_copies_recompute_too_and_apart() -> None:
    """A copy of the model runs its own layers, not those of the model that it was copied from."""
    batch = batches()["packed"]
    model = model_of("whole", MemoryConfig(checkpointing=1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(gradient(model, batch)["model.norm.weight"], gradient(other, batch)["model.norm.weight"])
    assert runs(other, batch) == 8


def test_the_built_in_engine_shares_the_module() -> None:
    import numpy as np

    from llm_gym.core import Sampling

    model = qwen3(**LAYERS)
    plain = copy.deepcopy(model)
    apply_memory_config(model, MemoryConfig(checkpointing=1))
    contexts = [np.arange(9, dtype=np.int32), np.arange(5, dtype=np.int32)]
    a, b = (
        TransformersPolicy(m).generate(contexts, Sampling(max_tokens=8, stop_token_ids=()), seeds=[1, 2])
        for m in (model, plain)
    )
    assert [c.tokens.tolist() for c in a] == [c.tokens.tolist() for c in b]
    assert decoder_layers(model)[0].keep == Keep(True, None)


def test_llama_and_autocast() -> None:
    from llm_gym.harness.learner.optimizers import OptimizerConfig

    batch = batches()["packed"]
    found = []
    for every in (0, 1):
        model = llama()
        apply_memory_config(model, MemoryConfig(checkpointing=every))
        learner = Learner(model, OptimizerConfig(dtype="bfloat16"))
        for micro in batch.micro:
            learner.backward(micro, 1.0)
        found.append(gradients(model))
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="there already"):
        check_memory(MemoryConfig(offload=True), None, layers=2, device="cpu")
    with pytest.raises(ConfigError, match=r"memory.checkpointing: got -1"):
        MemoryConfig(checkpointing=-1)
