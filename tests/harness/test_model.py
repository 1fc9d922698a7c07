"""Loading, norms, body and head: whatever the layout, the numbers are transformers' own."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import VOCABULARY, llama, qwen3, samples
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llm_gym import hub
from llm_gym.errors import ConfigError, SettingError
from llm_gym.harness.batching.packing import MicroBatch, pack
from llm_gym.harness.model.attention import Layout
from llm_gym.harness.model.loading import (
    Backbone,
    LoraConfig,
    check_model,
    export,
    load_model,
    merged,
    new_model,
    prepare,
)
from llm_gym.tokenizer import load_tokenizer

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
LENGTHS = [23, 5, 17, 9, 9, 2, 40]


def micro(lengths: list[int], seed: int = 0) -> MicroBatch:
    (only,) = pack(samples(lengths, seed=seed), max_tokens=10**6).micro
    return only


def plain_logits(model, batch: MicroBatch, attention: str = "eager") -> torch.Tensor:
    """The logits of each sequence run alone through transformers, [N, V]."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    with torch.no_grad():
        rows = [model(input_ids=row[None]).logits[0] for row in batch.tokens.split(list(batch.lengths))]
    model.set_attn_implementation(before)
    return torch.cat(rows)


def body_logits(body: Backbone, batch: MicroBatch) -> torch.Tensor:
    weight, bias = body.head()
    with torch.no_grad():
        return body.scale * torch.nn.functional.linear(body.hidden(batch), weight, bias)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_packed_logits(side: str) -> None:
    model = qwen3()
    batch = micro(LENGTHS)
    packed = body_logits(Backbone(model), batch)
    width = max(batch.lengths)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(batch.tokens.split(list(batch.lengths))):
        where = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[i, where], mask[i, where] = tokens, 1
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[mask.bool()], packed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [qwen3, llama])
def test_packed_logits_are_transformers_own(make) -> None:
    model = make()
    body = Backbone(model)
    assert body.packed
    batch = micro(LENGTHS)
    torch.testing.assert_close(body_logits(body, batch), plain_logits(model, batch), rtol=1e-4, atol=1e-5)


def test_float64_stays_float64() -> None:
    model = qwen3(dtype=torch.float64)
    batch = micro(LENGTHS)
    got, want = body_logits(Backbone(model), batch), plain_logits(model, batch, "sdpa")  # eager has a float32 softmax
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_sequences_cannot_see_each_other() -> None:
    """Change one sequence: every other one's hidden states keep their bits."""
    body = Backbone(qwen3())
    batch = micro(LENGTHS)
    with torch.no_grad():
        before = body.hidden(batch).split(list(batch.lengths))
        for changed in range(len(LENGTHS)):
            rows = list(batch.tokens.split(list(batch.lengths)))
            rows[changed] = (rows[changed] + 1) % VOCABULARY
            other = replace(batch, tokens=torch.cat(rows))
            after = body.hidden(other).split(list(batch.lengths))
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [i != changed for i in range(len(LENGTHS))]


def test_a_later_token_changes_nothing_before_it() -> None:
    body = Backbone(qwen3())
    batch = micro([30])
    tokens = batch.tokens.clone()
    tokens[20] = (tokens[20] + 1) % VOCABULARY
    other = replace(batch, tokens=tokens)
    with torch.no_grad():
        a, b = body.hidden(batch), body.hidden(other)
    assert torch.equal(a[:20], b[:20])
    assert not torch.equal(a[20], b[20])


def test_a_layer_that_misses_the_layout_is_noticed() -> None:
    """Transformers swallows unknown arguments: with another attention the layout would be ignored in silence."""
    model = qwen3()
    body = Backbone(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="0 of 2 layers read the layout"):
        body.hidden(micro([5, 6]))


def test_without_a_layout_our_attention_is_sdpa() -> None:
    model = qwen3()
    Backbone(model)
    ids = torch.randint(0, VOCABULARY, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        theirs = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lengths", [[7], [7, 7, 7], [40, 39, 31, 10, 9, 1, 1], [1]])
def test_layout_covers_every_token_once(lengths: list[int]) -> None:
    layout = Layout.of(lengths)
    assert sum(b.tokens for b in layout.blocks) == sum(lengths)
    assert sum(b.sequences for b in layout.blocks) == len(lengths)
    padded = sum(b.sequences * b.width for b in layout.blocks)
    assert padded <= sum(lengths) / 0.75
    for block in layout.blocks:
        x = torch.arange(1.0, block.tokens + 1)[:, None, None].expand(-1, 2, 3)
        assert torch.equal(block.unpad(block.pad(x)), x)


# Architectures that cannot be packed, and heads of other forms


def test_sliding_windows_fall_back_to_padded_rows(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = prepare(MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6)))
    body = Backbone(model)
    batch = micro([23, 5, 17])
    if body.packed:
        pytest.fail("a window of 6 was packed")
    assert "rows are padded" in caplog.text
    torch.testing.assert_close(body_logits(body, batch), plain_logits(model, batch), rtol=1e-4, atol=1e-5)


def test_a_logit_scale_is_found() -> None:
    torch.manual_seed(0)
    model = prepare(GraniteForCausalLM(GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=4.0)))
    body = Backbone(model)
    assert body.scale == pytest.approx(0.25)
    batch = micro([23, 5, 17])
    torch.testing.assert_close(body_logits(body, batch), plain_logits(model, batch), rtol=1e-4, atol=1e-5)


def test_a_soft_cap_in_attention_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """`sdpa` ignores it silently."""
    torch.manual_seed(0)
    fields = {"final_logit_softcapping": None, "attn_logit_softcapping": 0.5, "layer_types": ["full_attention"] * 2}
    model = prepare(Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, **fields)))
    body, batch = Backbone(model), micro([23, 5, 17])
    assert not body.packed
    torch.testing.assert_close(body_logits(body, batch), plain_logits(model, batch), rtol=1e-4, atol=1e-5)


# LoRA


def adapted(**fields):
    """A model with adapters that do something."""
    model = prepare(qwen3(**fields), lora=LoraConfig(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_lora_trains_adapters_only_and_starts_as_the_base() -> None:
    base, model = qwen3(), prepare(qwen3(), lora=LoraConfig(rank=4))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    batch = micro(LENGTHS)
    torch.testing.assert_close(body_logits(Backbone(model), batch), body_logits(Backbone(base), batch), rtol=0, atol=0)


def test_lora_is_in_the_packed_logits_and_can_be_taken_off() -> None:
    model = adapted()
    body, batch = Backbone(model), micro(LENGTHS)
    torch.testing.assert_close(body_logits(body, batch), plain_logits(model, batch), rtol=1e-4, atol=1e-5)
    with body.without_adapters():
        off = body_logits(body, batch)
    torch.testing.assert_close(off, body_logits(Backbone(qwen3()), batch), rtol=0, atol=0)
    assert not torch.allclose(off, body_logits(body, batch))


@pytest.mark.parametrize("how", ["adapter", "copy"])
def test_a_trained_head_under_peft_is_the_one_that_counts(how: str) -> None:
    fields = {
        "adapter": {"target_modules": ["q_proj", "lm_head"]},
        "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[how]
    model = peft.get_peft_model(qwen3(tie_word_embeddings=False), peft.LoraConfig(r=2, **fields)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.1
    body, batch = Backbone(model), micro([9, 4])
    want = plain_logits(model.base_model.model, batch)
    torch.testing.assert_close(body_logits(body, batch), want, rtol=1e-4, atol=1e-5)
    body.head()[0].sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    with body.without_adapters():
        assert torch.equal(body.head()[0], qwen3(tie_word_embeddings=False).lm_head.weight)


def test_a_hundred_merges_leave_the_base_bit_equal() -> None:
    """Merging in place and back drifts; ours works on a copy."""
    model = adapted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = micro(LENGTHS)
    want = body_logits(Backbone(model), batch)
    for _ in range(100):
        plain = merged(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    torch.testing.assert_close(body_logits(Backbone(plain), batch), want, rtol=1e-4, atol=1e-4)


# Loading


def test_a_folder_round_trip(tmp_path: Path) -> None:
    model = adapted()
    export(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    batch = micro(LENGTHS)
    torch.testing.assert_close(
        body_logits(Backbone(loaded), batch), body_logits(Backbone(model), batch), rtol=1e-4, atol=1e-4
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training


def test_export_in_bfloat16_loads_as_float32(tmp_path: Path) -> None:
    model = qwen3()
    export(model, tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    loaded = load_model(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight.bfloat16().float())


def test_the_embedded_model_is_the_default() -> None:
    assert load_model().config.model_type == "qwen3"


def test_a_bad_path_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_model("./no/such/model")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(tmp_path)


def test_an_unknown_hub_id_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="neither a model folder nor a hub id") as error:
        load_model("nobody/no-such-model-here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_where_no_name_resolves_the_hub_is_not_asked_again_and_again(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client tries five times for each file, with a line and a longer pause each time."""
    asked = []

    def unresolved(host: str, *args: object, **kwargs: object) -> None:
        asked.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SettingError, match="'no-such-model-here'") as error:
        load("no-such-model-here")
    assert "\n" not in str(error.value)
    assert len(asked) == 1


def test_new_models_are_a_function_of_the_seed() -> None:
    config = {"model_type": "qwen3", **SMALL}
    a, b, c = (new_model(config, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    with pytest.raises(ConfigError, match="model_type"):
        new_model({"model_type": "qwen33"}, seed=0)
    with pytest.raises(ConfigError, match="model_type"):
        new_model({}, seed=0)


@pytest.mark.parametrize("rope", [{"rope_type": "longrope"}, "none"])
def test_a_config_that_transformers_refuses_is_said_in_a_sentence(tmp_path: Path, rope: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", "rope_scaling": rope}))
    with pytest.raises(ConfigError, match="is neither a model folder nor a hub id that can be read"):
        check_model(tmp_path)
