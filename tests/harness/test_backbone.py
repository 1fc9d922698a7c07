"""Whatever else is in the batch, a row's log-probabilities are those of a plain forward of the row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import VOCABULARY, gradients, qwen3, samples
from transformers import AutoConfig, AutoModelForCausalLM

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model import backbone
from llm_gym.harness.model.loading import Backbone, LoraConfig, prepare
from llm_gym.harness.types import Batch

LENGTHS = [5, 17, 33, 40]
ROPE = {"rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 12.0], "factor": 8.0, **ROPE}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "LongRoPE": {
        "model_type": "phi3",
        "rope_parameters": {**LONG, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 32,
    },
    "dynamic NTK": {
        "model_type": "llama",
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE},
    },
    "a window in the mask alone": {"model_type": "phimoe", "sliding_window": 16, "num_local_experts": 4},
    "ALiBi": {"model_type": "falcon", "alibi": True, "multi_query": True, "new_decoder_architecture": False},
    "GPT-Neo": {"model_type": "gpt_neo", "window_size": 16, "attention_types": [[["global", "local"], 1]]},
    "Llama 4": {
        "model_type": "llama4_text",
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
    },
    "ModernBERT decoder": {"model_type": "modernbert-decoder", "local_attention": 32},
    "equal scores of sparse attention": {"model_type": "doge", "keep_window_size": 16},
    "Gemma 2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 16,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
    },
    "NanoChat": {"model_type": "nanochat", "final_logit_softcapping": 2.0, "rope_parameters": ROPE},
    "VaultGemma": {"model_type": "vaultgemma", "head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0},
    "RecurrentGemma": {
        "model_type": "recurrent_gemma",
        "num_hidden_layers": 3,
        "attention_window_size": 16,
        "lru_width": 32,
        "logits_soft_cap": 5.0,
    },
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model; no bias is 0 and no norm's weight 1."""
    fields = {**SMALL, **MODELS[name]}
    kind = fields.pop("model_type")
    torch.manual_seed(0)
    if kind == "gpt_neo":
        fields = {"num_layers": 2, "num_heads": 4, **{k: v for k, v in fields.items() if not k.startswith("num_")}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def rows_of(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(input tokens, places of what predicts a trained token, its id, its weight) of each row, from `batch`."""
    (micro,) = batch.micro
    found, start = [], 0
    for number, tokens in enumerate(torch.split(micro.tokens, list(micro.lengths))):
        mine = micro.streams["sequence"] == number
        weight = micro.streams["weight"][mine] * micro.streams["advantages"][mine]
        found.append((tokens, micro.streams["source"][mine] - start, micro.streams["target"][mine], weight))
        start += len(tokens)
    return found


def plain(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after every token of a row alone, as the model's own code computes them without kernels."""
    rotary = [m for m in model.modules() if hasattr(m, "max_seq_len_cached")]
    for module in rotary:  # dynamic NTK remembers the longest row
        module.max_seq_len_cached = 0
    return model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_short_rows_beside_long_ones_are_as_alone_and_so_are_their_gradients(name: str) -> None:
    torch.set_num_threads(1)
    exact_type = "num_local_experts" not in MODELS[name]  # torch has no grouped products of float64
    model = make(name, torch.float64 if exact_type else torch.float32)
    tolerance = 1e-5 if exact_type else 1e-3
    batch = pack(samples(LENGTHS), max_tokens=10**6)
    model.set_attn_implementation("eager")
    want, loss = [], torch.zeros(())
    for tokens, places, target, weight in rows_of(batch):
        logprobs = plain(model, tokens)[places].gather(1, target[:, None])[:, 0]
        want.append(logprobs.detach())
        loss = loss - (weight * logprobs).sum()
    loss.backward()
    exact = gradients(model)
    model.zero_grad(set_to_none=True)

    learner = Learner(prepare(model), loss=LossConfig(name="reinforce"))
    got, _ = learner.logprobs(batch.micro[0])
    torch.testing.assert_close(got, torch.cat(want), rtol=tolerance, atol=tolerance)
    learner.backward(batch.micro[0], 1.0)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, exact[key], rtol=0, atol=10 * tolerance * float(exact[key].abs().max() + 1e-9))


def test_rows_beyond_the_switch_of_a_rotary_embedding_go_alone() -> None:
    body = Backbone(make("LongRoPE", torch.float32))
    assert (body.packed, body.together, body.shares) == (True, 32, False)
    plainly = Backbone(qwen3())
    assert (plainly.packed, plainly.together, plainly.shares) == (True, float("inf"), True)


def test_the_cap_is_found_even_where_small_logits_do_not_show_it() -> None:
    model = make("Gemma 2", torch.float32)
    model.config.final_logit_softcapping = 30.0
    model.model.embed_tokens.weight.data *= 0.01
    assert Backbone(model).softcap == 30.0


def test_a_head_with_a_bias_may_be_adapted_over_half_precision() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **SMALL | {"num_key_value_heads": 4})
    half = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model = prepare(half, lora=LoraConfig(rank=2, target_modules=("lm_head",), base="bfloat16"))
    assert Backbone(model).packed


def test_an_encoder_is_refused_with_what_to_do() -> None:
    fields = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **fields))
    with pytest.raises(ConfigError, match="is_decoder=true") as error:
        Backbone(model)
    assert "\n" not in str(error.value)


def test_the_test_leaves_random_numbers_alone_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3(intermediate_size=40)
    before = torch.get_rng_state()
    Backbone(model)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(backbone, "SelfTest", None)
    Backbone(qwen3(intermediate_size=40))


def test_a_hook_on_the_model_itself_is_seen() -> None:
    """What the small copy cannot know: this attention looks back one token too far in packed rows."""
    model = qwen3()
    shift = lambda module, args, kwargs, output: (output[0].roll(1, 1), *output[1:])  # noqa: E731
    model.model.layers[0].self_attn.register_forward_hook(shift, with_kwargs=True)
    assert not Backbone(model).packed
