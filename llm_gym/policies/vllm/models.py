"""What a vLLM engine must be told of a model, so that it computes what transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_gym.errors import SettingError


def like_transformers(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments with what that model needs: a limit of its contexts, fields of its config under vLLM's names.

    LongRoPE and dynamic NTK give a context other angles when it is long. vLLM has one table of angles for all: those
    of long contexts if its limit allows one (LongRoPE), or of short ones (dynamic NTK). So no context may be so long
    that the angles change.

    Args:
        model: folder or hub id.
        settings: engine arguments, by vLLM's names; `max_model_len` as vLLM takes it (`16k`; None, -1 or `auto`: as
            many tokens as there can be) and `hf_overrides` are read.

    Raises:
        SettingError: longer contexts are wanted than can be right.
    """
    from transformers import AutoConfig

    from llm_gym.models.small_copy import ropes

    own = settings.get("hf_overrides")
    own = own if isinstance(own, Mapping) else {}
    try:
        config = AutoConfig.from_pretrained(model)
        config.update(own)
        config = config.get_text_config()
    except Exception:  # whatever is wrong with it, vLLM says it better
        return dict(settings)
    added: dict[str, Any] = {}
    bounds = [bound for rope in ropes(config) if (bound := _switch(config, rope)) is not None]
    if bounds:
        added["max_model_len"] = _within(settings.get("max_model_len"), min(bounds))
    if (scaling := _query_scaling(config)) and not isinstance(settings.get("hf_overrides"), str):
        added["hf_overrides"] = {"llama_4_scaling": scaling, **own}
    return {**settings, **added}


def _within(wanted: Any, most: int) -> Any:
    """`wanted` as a length of contexts, or `most` where it is left open."""
    tokens = _tokens(wanted)
    if tokens is None:
        return most
    if tokens > most:
        raise SettingError(
            f"policy.vllm.max_model_len: got {wanted}, but beyond {most} tokens the rotary embedding of this model is "
            f"stretched, and vLLM would use the same angles for short contexts; pass at most {most}."
        )
    return wanted


def _query_scaling(config: Any) -> dict[str, Any] | None:
    """How queries far into a context are scaled (Ministral 3); vLLM reads it from a field of its own."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta") is None or getattr(config, "llama_4_scaling", None):
        return None
    return {
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta": rope["llama_4_scaling_beta"],
    }


def _switch(config: Any, rope: Mapping[str, Any]) -> int | None:
    """The tokens beyond which a rotary embedding gives other angles; None: it never does."""
    if (kind := rope.get("rope_type")) == "dynamic" and "alpha" not in rope:
        return int(config.max_position_embeddings)
    if kind != "longrope":
        return None
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return int(original) if original < config.max_position_embeddings else None


def _tokens(length: Any) -> int | None:
    """A number of tokens as vLLM writes them (`25.6k`, `16K`); None: it chooses."""
    if length in (None, -1, "-1", "auto"):
        return None
    text = str(length).strip()
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    unit = scale.get(text[-1:], 1)
    try:
        return int(float(text.removesuffix(text[-1:]) if unit > 1 else text) * unit)
    except ValueError:  # vLLM says what is wrong with it
        return 0
