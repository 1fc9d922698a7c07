"""Adapters of every kind on every base: what is trained, what the sampler is given, what is written."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import gradients, qwen3, samples

from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner import weights
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.layers import decoder_layers
from llm_gym.harness.model.loading import Backbone, export, load_model, merged, plain_tensors, prepare
from llm_gym.harness.model.lora import KINDS, LoraConfig
from llm_gym.harness.model.memory import MemoryConfig, apply_memory_config
from llm_gym.harness.weight_sync.transports import modes_of
from llm_gym.models.folding import weight_of
from llm_gym.models.plain import HELD

EVERY = [(kind, base) for kind in KINDS for base in HELD]


def adapted(seed: int = 0, **fields: Any) -> Any:
    """The embedded model with adapters that do something."""
    if fields.get("base") == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    model = load_model(lora=LoraConfig(rank=4, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.2 * torch.rand_like(parameter))
    return model


def logits(model: Any) -> torch.Tensor:
    body = Backbone(model)
    (micro,) = pack(samples([30, 20, 11]), max_tokens=100).micro
    weight, bias = body.head()
    with torch.no_grad():
        return body.scale * torch.nn.functional.linear(body.hidden(micro).float(), weight.float(), bias)


@pytest.mark.parametrize(("kind", "base"), EVERY)
def test_what_is_sent_and_written_is_what_is_trained(kind: str, base: str, tmp_path: Path) -> None:
    """The plain tensors, the merged copy and the exported folder compute what the adapted model computes."""
    model = adapted(kind=kind, base=base)
    want = logits(model)
    sent = {name: tensor.float() for name, tensor in plain_tensors(model)}
    plain = load_model()
    assert sent.keys() == plain.state_dict().keys()
    plain.load_state_dict(sent)
    export(model, tmp_path / "m", dtype=torch.float32)
    tolerance = 1e-4 if base == "float32" else 3e-2  # of the largest logit; half precision computes it
    for other in (plain, load_model(tmp_path / "m"), merged(model).float()):
        assert float((logits(other) - want).abs().max()) < tolerance * float(want.abs().max())
    if base != "float32":  # nothing was rounded on the way: a mere cast of the embedded weights would differ by more
        written = load_model(tmp_path / "m").state_dict()
        assert all(torch.allclose(written[n], t, rtol=1e-2, atol=1e-3) for n, t in sent.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_pefts_own(kind: str) -> None:
    """`weight_of` against merging a copy, bit by bit up to float32's rounding."""
    model = adapted(kind=kind)
    for (name, ours), theirs in zip(plain_tensors(model), merged(model).state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "scale"), [("lora", 8 / 4), ("rslora", 8 / math.sqrt(4))])
def test_the_scale_is_the_papers(kind: str, scale: float) -> None:
    model = adapted(kind=kind, alpha=8.0)
    layer = decoder_layers(model)[0].self_attn.q_proj
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(weight_of(layer) - layer.base_layer.weight, scale * update, rtol=1e-4, atol=1e-6)


def test_a_doras_rows_are_as_long_as_its_magnitudes() -> None:
    model = adapted(kind="dora")
    layer = decoder_layers(model)[1].mlp.up_proj
    torch.testing.assert_close(weight_of(layer).norm(dim=1), layer.lora_magnitude_vector["default"].weight)


@pytest.mark.parametrize(("kind", "base"), EVERY)
def test_only_float32_adapters_are_trained_and_the_base_keeps_its_bits(kind: str, base: str) -> None:
    model = adapted(kind=kind, base=base)
    before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    learner = Learner(model, OptimizerConfig(lr=1e-3))
    for step in range(2):
        learner.step(pack(samples([12, 9, 14], seed=step), max_tokens=20))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    changed = {n for n, t in model.state_dict().items() if n in before and not torch.equal(t, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in changed)
    assert any("magnitude" in name for name in changed) == (kind == "dora")


def test_four_bits_are_smaller_than_sixteen() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {base: decoder_layers(adapted(base=base)) for base in HELD}
    held = {base: sum(p.nbytes for n, p in m.named_parameters() if "base_layer" in n) for base, m in sizes.items()}
    assert held["nf4"] * 4 == held["bfloat16"]
    assert held["bfloat16"] * 2 == held["float32"]


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_the_gradient_of_a_qlora_is_that_of_its_numbers(checkpointing: int) -> None:
    """Adapters over 4 bits against the same adapters over the same weights, written out in float32."""
    four = adapted(base="nf4", layers="1-2")
    numbers = load_model(lora=LoraConfig(rank=4, layers="1-2"))
    bare = {n: t.float() for n, t in plain_tensors(four, adapters=False)}
    with torch.no_grad():
        for name, parameter in numbers.get_base_model().named_parameters():
            source = dict(four.get_base_model().named_parameters()).get(name)
            parameter.copy_(source if "lora_" in name else bare[name.replace(".base_layer.", ".")])
    found = []
    for model in (four, numbers):
        if checkpointing:
            apply_memory_config(model, MemoryConfig(checkpointing=1))
        learner = Learner(model)
        for micro in pack(samples([12, 9, 14]), max_tokens=100).micro:
            learner.backward(micro, 1.0)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in found]
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 0.99  # bfloat16 against float32


@pytest.mark.parametrize(
    ("layers", "expected"), [("1", {1}), ("-2", {2, 3}), ("0,2-3", {0, 2, 3}), ("2-", {2, 3}), ("", {0, 1, 2, 3})]
)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
def test_layers_filter(layers: str, expected: set[int], targets: Any) -> None:
    model = prepare(qwen3(num_hidden_layers=4), lora=LoraConfig(rank=2, layers=layers, target_modules=targets))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in trained} == expected
    each = 7 if targets == "all-linear" else 2
    assert len(trained) == len(expected) * each * 2


def test_bad_settings_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, message in (
        ({"kind": "dara"}, "lora.kind: unknown value 'dara'; did you mean 'dora'"),
        ({"base": "int4"}, "lora.base"),
        ({"rank": 0}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha: got 0.0"),
        ({"dropout": 0.1}, "lora.dropout: got 0.1, want 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**fields)
    with pytest.raises(ConfigError, match=r"lora\.layers: got '20-31', but the model has layers 0 to 3"):
        load_model(lora=LoraConfig(layers="20-31"))
    with pytest.raises(ConfigError, match=r"lora\.target_modules: .*'nothing'"):
        prepare(qwen3(), lora=LoraConfig(target_modules=("nothing",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora\.base: 'nf4' needs bitsandbytes"):
        load_model(lora=LoraConfig(base="nf4"))


# The sampler


def test_doras_are_merged_for_vllm() -> None:
    """vLLM refuses them as adapters; rsLoRA it can hold."""

    def modes(kind: str, sync: str = "auto", engine: str = "vllm") -> list[str]:
        return modes_of(load(TrainConfig, lora={"kind": kind}, policy={"engine": engine, "sync": sync}), engine)

    assert modes("lora") == modes("rslora") == ["adapter", "merged"]
    assert modes("dora") == ["merged"]
    assert modes("dora", engine="transformers") == ["shared"]
    with pytest.raises(
        ConfigError, match=r"'adapter' does not work with engine 'vllm' with 'dora' adapters; valid: auto, merged"
    ):
        modes("dora", "adapter")


@pytest.mark.parametrize(
    ("kind", "base", "sync"),
    [("rslora", "float32", "shared"), ("dora", "bfloat16", "copy"), ("lora", "nf4", "shared"), ("lora", "nf4", "copy")],
)
def test_a_run_with_the_built_in_engine_and_its_resume(kind: str, base: str, sync: str, tmp_path: Path) -> None:
    """Engine and learner agree (the canaries are in every step), and two steps are one and one more.

    An engine with a module of its own, as split models have, holds float32 whatever the frozen weights are held in.
    """
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    fields = {
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "eval": {"episodes": 0},
        "checkpoint": {"every": 1},
        "lora": {"rank": 4, "kind": kind, "base": base, "layers": "-2"},
        "memory": {"checkpointing": 2},
        "policy": {"sync": sync},
    }
    config = load(TrainConfig, **fields, sampling={"max_tokens": 16})
    whole = Trainer(config, out=tmp_path / "a")
    rows = whole.train()
    assert rows[-1]["sync/canary_gap_max"] < (1e-3 if base == "float32" else 0.1)
    (first, _) = whole.run.checkpoints()
    again = Trainer(config, out=tmp_path / "b")
    weights.restore(again.learner, first)
    again.step = 1
    again.sync(1)
    again.train()
    a, b = (t.model.state_dict() for t in (whole, again))
    assert all(torch.equal(t, b[n]) for n, t in a.items() if "lora_" in n)


def test_nothing_is_advised_where_adapters_are_made() -> None:
    """bitsandbytes, imported with peft, speaks of a faster kernel for 4 bits; once, so this takes a process of its own."""
    code = "from llm_gym.harness.model.loading import LoraConfig, load_model; load_model(lora=LoraConfig(rank=2))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
