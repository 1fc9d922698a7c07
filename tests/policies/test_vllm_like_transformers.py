"""What a vLLM engine is told of a model so that it computes what transformers does, without starting one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_gym.errors import SettingError
from llm_gym.policies.vllm.models import like_transformers

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 12.0]}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def folder(path: Path, rope: Any, **fields: Any) -> str:
    """One that holds the config of a small model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "vocab_size": 97, "max_position_embeddings": 256, "pad_token_id": 0}
    config = {"model_type": "llama", **sizes, "rope_parameters": rope, **fields}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


PHI: dict[str, Any] = {"model_type": "phi3", "original_max_position_embeddings": 32}
GEMMA: dict[str, Any] = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
BOUNDED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "LongRoPE": (LONG, PHI, 32),
    "dynamic NTK": (DYNAMIC, {}, 256),
    "LongRoPE in some of the layers": ({"full_attention": LONG, "sliding_attention": PLAIN}, GEMMA, 32),
    "dynamic NTK in some of the layers": ({"full_attention": DYNAMIC, "sliding_attention": PLAIN}, GEMMA, 256),
}


def longest(model: str, wanted: Any) -> Any:
    return like_transformers(model, {"max_model_len": wanted})["max_model_len"]


@pytest.mark.parametrize("case", BOUNDED)
def test_where_angles_change_a_limit_is_set(tmp_path: Path, case: str) -> None:
    rope, fields, most = BOUNDED[case]
    model = folder(tmp_path, rope, **fields)
    assert [longest(model, wanted) for wanted in (None, -1, "-1", "auto")] == [most] * 4
    assert [longest(model, wanted) for wanted in (16, "16", "0.01k")] == [16, "16", "0.01k"]
    for wanted in (most + 1, "1k", "1K"):
        with pytest.raises(SettingError, match=f"got {wanted}, but beyond {most} tokens"):
            longest(model, wanted)


FREE: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "LongRoPE that never switches": (LONG, PHI | {"max_position_embeddings": 32}),
    "no rotary embedding": (None, {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2}),
    "no attention": (None, {"model_type": "mamba"}),
    "a config that transformers refuses": (PLAIN, {"hidden_size": "wide"}),
    "a rotary embedding that lacks a field": ({"rope_type": "su", **FACTORS}, PHI),
}


@pytest.mark.parametrize("case", FREE)
def test_elsewhere_vllm_may_choose(tmp_path: Path, case: str) -> None:
    rope, fields = FREE[case]
    model = folder(tmp_path, rope, **fields)
    assert [longest(model, wanted) for wanted in (None, -1, "auto", 512)] == [None, -1, "auto", 512]


def test_a_limit_is_that_of_the_config_as_it_is_served(tmp_path: Path) -> None:
    longer = {"max_position_embeddings": 512}
    assert longest(folder(tmp_path, DYNAMIC), None) == 256
    assert like_transformers(folder(tmp_path, DYNAMIC), {"hf_overrides": longer})["max_model_len"] == 512


MINISTRAL = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "llama_4_scaling_beta": 0.3}


def test_the_scale_of_far_queries_is_told_in_the_field_that_vllm_reads(tmp_path: Path) -> None:
    model = folder(tmp_path, MINISTRAL | {"original_max_position_embeddings": 32}, model_type="ministral3")
    scaling = {"original_max_position_embeddings": 32, "beta": 0.3}
    assert like_transformers(model, {})["hf_overrides"] == {"llama_4_scaling": scaling}
    assert like_transformers(model, {"hf_overrides": {"rms_norm_eps": 1e-3}})["hf_overrides"] == {
        "llama_4_scaling": scaling,
        "rms_norm_eps": 1e-3,
    }
    assert "hf_overrides" not in like_transformers(folder(tmp_path, PLAIN), {})
