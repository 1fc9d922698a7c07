"""Where a run computes."""

from __future__ import annotations

import re

import torch

from llm_gym.errors import ConfigError


def check_device_name(name: str) -> None:
    """Looks at the form alone: a configuration may be read where no GPU is.

    Raises:
        ConfigError: neither `auto`, nor `cpu`, nor `cuda` with or without a number.
    """
    if name not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", str(name)):
        raise ConfigError(f"device: got {name!r}, want auto, cpu, cuda or cuda:1.")


def device_of(name: str) -> torch.device:
    """The device asked for; `auto` is the GPU if there is one.

    Raises:
        ConfigError: it is not here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        here = f"there are {count} CUDA devices" if count else "torch finds no CUDA device"
        raise ConfigError(f"device: got {name!r}, but {here} here; pass auto or cpu.")
    return device
