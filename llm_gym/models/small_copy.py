"""A small copy of a model: its class, its kinds of layers and its switches, with sizes and lengths that cost little.

What a model does may change at a length (a sliding window, a chunk of attention, the context that a rotary embedding
was trained at) or at a size (a soft cap, a clamp). In the copy these stand at a few tokens and at ordinary
activations, so that crossing all of them takes milliseconds. The dimension of a head stays, for factors of a rotary
embedding are given per dimension; so does the ratio of contexts before and after an extension.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

STEP = 8
"""Tokens between switches in the copy."""
LONGEST = 24
"""Most layers of the copy: those up to the last of a new kind."""
MOST = 100_000_000
"""Most weights of a copy worth its price."""
VOCABULARY = 128
LENGTH = re.compile(
    r"sliding_windows?(_size)?|window_size|attention_window(_size)?|attention_chunk_size|local_attention|"
    r"keep_window_size|index_topk|floor_scale|original_max_position_embeddings"
)
"""Fields that hold a number of tokens at which something switches."""
LIMIT = re.compile(r".*(soft_?cap(ping)?|logit_cap|swiglu_limits?(_shared)?|clip_qkv|clamp_limit|act_limit)")
"""Fields that hold a size at which something is capped or cut off."""
WIDTH = re.compile(r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff|dim_ff|ffn_size)")
"""Fields that hold the width of an MLP."""
FEW = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 16),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 64),
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_num_heads": 2},
    "index_n_heads": 1,  # its scores are then often equal, and which of two equal keys is taken depends on padding
}
"""Fields of which little is enough, and how much."""
STATE_SPACES = (("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("num_heads", "head_dim", "expand"))
"""Fields of state-space layers: their heads, each one's width, and how much wider than the model they are together."""


def small_copy(model: Any) -> tuple[Any, dict[int, int]] | None:
    """A float32 copy on the CPU with weights of a fixed seed, and its switches: {tokens in it: tokens in the model}.

    Global random state is left as it is.

    Args:
        model: a causal language model of transformers, without peft around it.

    Returns:
        None if no such copy can be built, or it would have other kinds of modules than the model.
    """
    for heads in (2, 4, None):
        try:
            config, switches = _small_config(model, heads)
            with torch.device("meta"):
                plan = type(model)(copy.deepcopy(config))
            if sum(p.numel() for p in plan.parameters()) > MOST or _kinds(plan) != _kinds(model):
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                small = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")
                _stir(small)
            small = small.eval().requires_grad_(False)
            small(input_ids=torch.arange(1, 4)[None], use_cache=False)
            return small, switches
        except Exception as error:
            log.debug("no small copy of %s with %s heads: %r", type(model).__name__, heads, error)
    return None


def switches_of(config: Any) -> list[int]:
    """Every number of tokens at which the model of a config may switch, ascending."""
    return sorted({value for _, _, value in _lengths(config)})


def _small_config(model: Any, heads: int | None) -> tuple[Any, dict[int, int]]:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    _cut_layers(text, _layers_needed(model, text.num_hidden_layers))
    if heads is not None:
        _narrow(text, heads)
    for field in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(getattr(text, field, None), int):
            setattr(text, field, min(getattr(text, field), VOCABULARY))
    for part in {id(config): config, id(text): text}.values():
        for field in [field for field in vars(part) if field.endswith("_token_id")]:
            if getattr(part, field) is not None:
                setattr(part, field, 0)
    for name in getattr(config, "sub_configs", {}):  # eyes and ears
        if (part := getattr(config, name, None)) is not None and part is not text:
            for field in ("num_hidden_layers", "depth", "num_blocks"):
                if isinstance(getattr(part, field, None), int):
                    setattr(part, field, 1)
    for field, value in list(vars(text).items()):
        if LIMIT.fullmatch(field):
            setattr(text, field, _each(value, lambda number: min(number, 1.0)))
    text.initializer_range = 1.5 / math.sqrt(text.hidden_size)
    return config, _shorten(text)


# Lengths


def _lengths(config: Any) -> Iterator[tuple[Any, str, int]]:
    """(where it stands, its name, its value) of every length at which something switches; lists have several."""
    every = [config] if not isinstance(config, dict) else []
    places = [vars(part) for part in every] + [r for part in every for r in ropes(part)]
    for place in places:
        for field, value in list(place.items()):
            field_ = field.removeprefix("_")
            if LENGTH.fullmatch(field_) or (field_ == "max_position_embeddings" and is_dynamic(config)):
                for number in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(number, int) and not isinstance(number, bool) and number > 1:
                        yield place, field, number


def ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of its rotary embeddings; some models have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(inner for inner in rope.values() if isinstance(inner, dict))] if isinstance(rope, dict) else []


def is_dynamic(config: Any) -> bool:
    """Whether the angles of its rotary embedding depend on the longest row (dynamic NTK)."""
    return any("dynamic" in str(rope.get("rope_type")) for rope in ropes(config))


def _shorten(config: Any) -> dict[int, int]:
    """Brings every switch to a few tokens, keeping their order; returns {new: old}."""
    found = list(_lengths(config))
    values = sorted({value for *_, value in found})
    new = {value: min(value, STEP * (i + 1)) for i, value in enumerate(values)}
    before = getattr(config, "max_position_embeddings", None)
    for place, field, _ in found:
        place[field] = _each(place[field], lambda number: new.get(number, number))
    original = next((v for _, field, v in found if field == "original_max_position_embeddings"), None)
    if original is not None and before and not is_dynamic(config):
        config.max_position_embeddings = max(-(-before * new[original] // original), new[original] + 1)
    if hasattr(config, "local_attention") and hasattr(config, "sliding_window"):  # derived when it was made
        config.local_attention = 2 * config.sliding_window
    return {new[value]: value for value in values}


def _each(value: Any, change: Any) -> Any:
    """A number, or each number of a list, changed; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return change(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else value


# Layers


def _layers_needed(model: Any, count: int) -> int:
    """How many of the first layers show every kind that there is."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    needed = 1
    for layers in lists:
        seen: set[Any] = set()
        for number, layer in enumerate(layers, 1):
            if (kind := _signature(layer)) not in seen:
                seen.add(kind)
                needed = max(needed, number)
    return min(needed, LONGEST, count)


def _signature(layer: nn.Module) -> Any:
    """What tells kinds of layers apart: its modules, and the settings that they hold."""
    return tuple(
        (name, type(module).__name__, *sorted((k, v) for k, v in vars(module).items() if _is_setting(k, v)))
        for name, module in layer.named_modules()
        if "lora_" not in name
    )


def _is_setting(name: str, value: Any) -> bool:
    numbered = re.search(r"idx|index|layer_id|layer_number|^layer$|hook|training", name)
    return not numbered and isinstance(value, bool | str | int | float)


def _cut_layers(config: Any, keep: int) -> None:
    count = config.num_hidden_layers
    for field, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count and field != "architectures":
            setattr(config, field, value[:keep])
        elif field in ("decoder_layers", "encoder_layers"):
            setattr(config, field, keep)
    config.num_hidden_layers = keep


def _kinds(model: nn.Module) -> set[str]:
    """Names of the classes of its modules, as transformers wrote them."""
    base = (
        next((c for c in type(m).__mro__ if c.__module__.startswith(("transformers", "torch"))), type(m))
        for m in model.modules()
    )
    return {cls.__name__ for cls in base if issubclass(cls, nn.Module) and cls.__module__.startswith("transformers")}


# Widths


def _narrow(config: Any, least: int) -> None:
    """So many heads (twice as many where they share keys), narrow MLPs, few experts."""
    heads, kept, dim = (_number(config, f) for f in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    wide, new = config.hidden_size, 0
    if heads is not None:
        new = min(heads, 2 * least if kept is not None and 1 < kept < heads else least)
        width = new * (dim or wide // heads)
        config.num_attention_heads = new
        for field in ("decoder_attention_heads", "encoder_attention_heads"):
            if hasattr(config, field):
                setattr(config, field, new)
        if kept is not None:
            config.num_key_value_heads = new if kept == heads else min(kept, least)
    else:
        width = wide if heads is None and hasattr(config, "num_attention_heads") else min(wide, 64)
    for field, value in list(vars(config).items()):
        name = field.removeprefix("_")
        if LENGTH.fullmatch(name):
            continue
        if type(value) is int and value == wide and re.search("hidden|dim|size|width|embd|d_model", name):
            setattr(config, field, width)
        elif WIDTH.fullmatch(name):
            narrow = (lambda number: min(number, 64)) if new else (lambda number: number * width // wide)
            setattr(config, field, _each(value, narrow))
        elif name in FEW and isinstance(value, int):
            setattr(config, field, min(value, FEW[name]))
    config.hidden_size = width
    for count, dim_field, expand in STATE_SPACES:
        if all(_number(config, field) is not None for field in (count, dim_field, expand)):
            setattr(config, count, getattr(config, expand) * width // getattr(config, dim_field))
            for field in ("n_groups", "mamba_n_groups", "mamba_ngroups"):
                if hasattr(config, field):
                    setattr(config, field, 1)


def _number(config: Any, field: str) -> int | None:
    """A field that holds one number for all layers."""
    try:
        value = getattr(config, field, None)
    except Exception:  # some configs raise for a field that differs between layers
        return None
    return value if type(value) is int else None


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Moves biases and the weights of norms away from what they are initialised to, so that none can be left out."""
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.is_floating_point() and len(parameter) > 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
