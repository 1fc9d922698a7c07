"""Layers by number, and training only some weights."""

from __future__ import annotations

import pytest
import torch
from small_models import gradients, llama, qwen3, samples

from llm_gym.errors import ConfigError
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.layers import NAMED, decoder_layers, parse_layers
from llm_gym.harness.model.loading import LoraConfig, load_model, prepare
from llm_gym.harness.model.memory import MemoryConfig, check_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", [7]), ("20-31", [*range(20, 32)]), ("-4", [28, 29, 30, 31]), ("30-", [30, 31]), ("3, 1-2,3", [1, 2, 3])],
)
def test_layer_numbers(text: str, expected: list[int]) -> None:
    assert parse_layers(text, 32, "x") == (expected, [])


def test_names_among_them() -> None:
    assert parse_layers("norms,-1,head", 4, "x", NAMED) == ([3], ["norms", "head"])


@pytest.mark.parametrize("text", ["32", "0-32", "-33", "-0", "5-3"])
def test_layers_that_are_not_there(text: str) -> None:
    with pytest.raises(ConfigError, match=f"x: got {text!r}, but the model has layers 0 to 31"):
        parse_layers(text, 32, "x")


@pytest.mark.parametrize("text", ["-", "last", "1..3", "1,,2", "1-2-3", "head"])
def test_what_is_no_layer(text: str) -> None:
    with pytest.raises(ConfigError, match="want parts such as 7, 20-31"):
        parse_layers(text, 32, "x")


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("-1", {"model.layers.1"}),
        ("0-1", {"model.layers.0", "model.layers.1"}),
        ("norms", {"model.norm", "norm"}),
        ("head,0", {"lm_head", "model.layers.0"}),
        ("embeddings", {"model.embed_tokens"}),
    ],
)
def test_the_rest_stays_as_it_is(text: str, trained: set[str]) -> None:
    """What is trained has the gradient that it has in full fine-tuning; the rest has none, and no optimizer state."""
    batch = pack(samples([14, 9, 20]), max_tokens=100)
    found = []
    for layers in ("", text):
        model = prepare(llama(), memory=MemoryConfig(train_layers=layers))
        learner = Learner(model)
        learner.backward(batch.micro[0], 1.0)
        found.append(gradients(model))
    whole, part = found

    def chosen(name: str) -> bool:
        return any(name.startswith(t) for t in trained) or ("norm" in trained and "norm" in name)

    assert part.keys() == {n for n in whole if chosen(n)}
    assert all(torch.allclose(g, whole[n], rtol=1e-6, atol=1e-9) for n, g in part.items())
    held = {id(p) for o in learner.optimizers for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if chosen(n)}


def test_a_tied_head_is_the_embedding() -> None:
    model = prepare(qwen3(), memory=MemoryConfig(train_layers="head"))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_bad_settings_come_before_the_weights() -> None:
    with pytest.raises(ConfigError, match=r"memory\.train_layers: got '9', but the model has layers 0 to 3"):
        load_model(memory=MemoryConfig(train_layers="9"))
    with pytest.raises(ConfigError, match="with adapters no weight is trained"):
        check_memory(MemoryConfig(train_layers="1"), LoraConfig(), layers=4, device="cpu")


def test_layers_beneath_adapters() -> None:
    assert len(decoder_layers(prepare(qwen3(), lora=LoraConfig(rank=2)))) == 2
