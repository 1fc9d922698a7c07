"""A decoder's layers by number, and training only some of a model's weights."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from llm_gym.errors import ConfigError
from llm_gym.models.folding import base_of as base_of

NAMED = ("embeddings", "head", "norms")
"""What `train` takes besides layers."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, first to last.

    Raises:
        ConfigError: the decoder keeps them in no list of `num_hidden_layers` modules.
    """
    base = base_of(model)
    count = base.config.get_text_config().num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"model: {type(base).__name__} has no list of {count} layers, so single layers cannot be named.")


def parse_layers(text: str, count: int, where: str, named: tuple[str, ...] = ()) -> tuple[list[int], list[str]]:
    """Layer numbers (ascending, from 0) and names in a comma-separated text.

    `7` is a layer, `20-31` are twelve of them, `20-` those from 20 on, `-4` the last four.

    Args:
        text: what was asked for.
        count: layers of the model.
        where: the setting, for the error.
        named: other words that are welcome.

    Raises:
        ConfigError: the text is of no such form, or a layer does not exist.
    """
    layers: set[int] = set()
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d*)(-?)(\d*)", part)
        if part in named:
            names.append(part)
        elif match is None or not any(c.isdigit() for c in part):
            form = ", ".join(["7", "20-31", "20-", "-4 (the last four)", *named])
            raise ConfigError(f"{where}: got {part!r} in {text!r}, want parts such as {form}, joined by commas.")
        else:
            layers.update(_span(match, count, f"{where}: got {part!r}, but the model has layers 0 to {count - 1}."))
    return sorted(layers), names


def _span(match: re.Match[str], count: int, complaint: str) -> range:
    first, dash, last = match.groups()
    if not first:
        start, end = count - int(last), count - 1
    else:
        start, end = int(first), int(last or (count - 1 if dash else first))
    if not 0 <= start <= end < count:
        raise ConfigError(complaint)
    return range(start, end + 1)


def train_only(model: Any, text: str) -> None:
    """Freezes every weight but those named: layers (see `parse_layers`), `embeddings`, `head`, `norms`.

    `norms` are all one-dimensional weights, biases included. A tied head is the embedding matrix: either name
    trains it.

    Raises:
        ConfigError: the text names nothing that the model has.
    """
    layers = decoder_layers(model)
    numbers, names = parse_layers(text, len(layers), "memory.train_layers", NAMED)
    model.requires_grad_(False)
    for number in numbers:
        layers[number].requires_grad_(True)
    ends = {"embeddings": model.get_input_embeddings, "head": model.get_output_embeddings}
    for name in names:
        if name == "norms":
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.requires_grad or parameter.ndim == 1)
        else:
            ends[name]().requires_grad_(True)
