"""Loading a causal language model for training, and writing it for others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from llm_gym import embedded
from llm_gym.errors import ConfigError, LLMGymError
from llm_gym.harness.model.backbone import Backbone as Backbone
from llm_gym.harness.model.cpu_mlp import fuse_mlps
from llm_gym.harness.model.cpu_rmsnorm import fuse_norms
from llm_gym.harness.model.lora import LoraConfig as LoraConfig
from llm_gym.harness.model.lora import add_adapters, check_folding, check_targets
from llm_gym.harness.model.memory import MemoryConfig, apply_memory_config, check_memory
from llm_gym.hub import offline_if_unreachable
from llm_gym.models.folding import plain_tensors as plain_tensors
from llm_gym.models.folding import whole
from llm_gym.models.plain import is_adapter, load_base, recorded_base
from llm_gym.models.plain import merged as merged


def load_model(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora: LoraConfig | None = None,
    memory: MemoryConfig | None = None,
) -> Any:
    """A causal language model, ready to train.

    Args:
        path: a folder in the Hugging Face layout, or a hub id; None: the embedded model. An adapter's folder is that
            adapter folded into its base.
        dtype: of the master weights. Keep float32: an update of 1e-6 vanishes when added to a bfloat16 weight.
            Frozen weights beneath adapters are held as `lora.base` says.
        device: where the weights live.
        lora: adapters to add; they are float32 whatever `dtype` is.
        memory: what is trained, and what is kept for backward.

    Returns:
        A transformers model, or a peft model around it, in eval mode (no dropout, ever).

    Raises:
        ConfigError: `path` is no model, said before anything is loaded.
    """
    config = check_model(path, lora=lora, memory=memory, device=device)
    hf_logging.disable_progress_bar()
    held, kind = ("float32", dtype) if lora is None or lora.base == "float32" else (lora.base, None)
    source = embedded.PATH if path is None else path
    try:
        model = load_base(source, held, dtype=kind, device=device, config=config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, LLMGymError | torch.OutOfMemoryError):
            raise
        raise ConfigError(f"model: {str(source)!r} cannot be loaded ({' '.join(str(error).split()):.300}).") from error
    check_numbers(model, source)
    return prepare(model, device=device, lora=lora, memory=memory)


def check_model(
    path: str | Path | None,
    *,
    lora: LoraConfig | None = None,
    memory: MemoryConfig | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Looks at a model's config, and whether it has what adapters and thrift ask for; loads no weights.

    Returns:
        The config, a transformers one.

    Raises:
        ConfigError: there is no such model, or a setting that it cannot have.
    """
    config = config_of(path)
    check_memory(memory, lora, layers=config.get_text_config().num_hidden_layers, device=device)
    if lora is not None and (lora.named or lora.modules_to_save):
        empty = None
        with suppress(ValueError, KeyError, ImportError), torch.device("meta"):  # else loading it will say why
            empty = AutoModelForCausalLM.from_config(config)
        if empty is not None:
            check_targets(empty, lora)
    return config


@torch.no_grad()
def check_numbers(model: Any, source: str | Path) -> None:
    """Looks at every weight.

    Raises:
        ConfigError: one is NaN or infinite: whatever is computed with it would be, too.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.sum(dtype=torch.float32)):
            raise ConfigError(f"model: weights of {str(source)!r} are not finite, {name!r} first; load another file.")


def new_model(config: Mapping[str, Any], *, seed: int, device: torch.device | str = "cpu") -> Any:
    """A freshly initialised float32 model of a Hugging Face config given as a mapping (`model_type` and fields).

    Raises:
        ConfigError: the mapping names no known model type, or its fields make no model.
    """
    fields = dict(config)
    try:
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    except KeyError as error:
        raise ConfigError(f"init: want a config with a known model_type, got {config!r}.") from error
    except Exception as error:  # each model checks its fields in its own way
        raise ConfigError(f"init: no model can be made of {config!r} ({error}).") from error
    return prepare(model, device=device)


def prepare(
    model: Any,
    *,
    device: torch.device | str = "cpu",
    lora: LoraConfig | None = None,
    memory: MemoryConfig | None = None,
) -> Any:
    """Faster norms and MLPs, adapters if wanted, thrift with memory, eval mode, on the device."""
    fuse_norms(model)
    fuse_mlps(model)
    model = model.eval() if hasattr(model, "quantization_method") else model.to(device).eval()  # 4 bits are there
    if lora is not None:
        model = add_adapters(model, lora).eval()
    apply_memory_config(model, memory or MemoryConfig())
    if lora is not None:
        check_folding(model)
    return model


def config_of(path: str | Path | None, where: str = "model") -> Any:
    """The model's config, a transformers one; None: of the embedded model.

    Args:
        path: folder or hub id.
        where: the setting, for the error.

    Raises:
        ConfigError: there is no such model, or no way to it.
    """
    path = embedded.PATH if path is None else path
    folder = Path(path)
    said = str(path)
    local = folder.exists() or folder.is_absolute() or said.startswith((".", "~")) or said.count("/") > 1
    local = local or said.endswith("/")
    if local and not (folder / "config.json").is_file():
        if is_adapter(folder):
            return config_of(recorded_base(folder)[0] or embedded.PATH, where)
        what = "no such folder" if not folder.exists() else "it has no config.json"
        raise ConfigError(f"{where}: {str(path)!r} is not a model folder: {what}.")
    try:
        with offline_if_unreachable(str(path)):
            return AutoConfig.from_pretrained(str(path))
    except Exception as error:  # each config checks its fields in its own way
        reason = re.split(r"(?<=\w)\.\s", " ".join(str(error).strip().splitlines()[:2]))[0].rstrip(".")
        raise ConfigError(
            f"{where}: {str(path)!r} is neither a model folder nor a hub id that can be read ({reason})."
        ) from error


# --- in and out --------------------------------------------------------------------------------------------


def adapter_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors by the names that peft saves them under, and its `adapter_config.json` as a mapping.

    Tensors come whole, as from `plain_tensors`.
    """
    import peft

    config = next(iter(model.peft_config.values())).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # frozen ones are the base's
    return {name: whole(tensor.detach()) for name, tensor in state.items()}, plain


def export(model: Any, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a Hugging Face folder, adapters folded in, converted to `dtype` if given."""
    plain = merged(model)
    (plain if dtype is None else plain.to(dtype)).save_pretrained(str(folder))
