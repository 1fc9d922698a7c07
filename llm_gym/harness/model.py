"""Loading a causal language model for training, and writing it for others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from llm_gym import embedded
from llm_gym.errors import ConfigError
from llm_gym.harness.backbone import Body as Body
from llm_gym.harness.layers import base_of
from llm_gym.harness.lora import LoraConfig as LoraConfig
from llm_gym.harness.lora import add_adapters, weight_of
from llm_gym.harness.memory import MemoryConfig, check_memory, economise
from llm_gym.harness.mlps import fuse_mlps
from llm_gym.harness.norms import fuse_norms
from llm_gym.harness.sharding import is_sharded, whole
from llm_gym.policies.model import copy_weights


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
        path: a folder in the Hugging Face layout, or a hub id; None: the embedded model.
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
    config = _config(embedded.PATH if path is None else path)
    check_memory(memory, lora, layers=config.get_text_config().num_hidden_layers, device=device)
    hf_logging.disable_progress_bar()
    source = str(embedded.PATH if path is None else path)
    if lora is None or lora.base == "float32":
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    else:
        model = lora.load(source, config, device)
    return prepare(model, device=device, lora=lora, memory=memory)


def new_model(config: Mapping[str, Any], *, seed: int, device: torch.device | str = "cpu") -> Any:
    """A freshly initialised float32 model of a Hugging Face config given as a mapping (`model_type` and fields).

    Raises:
        ConfigError: the mapping names no known model type.
    """
    fields = dict(config)
    try:
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"init: want a config with a known model_type, got {config!r}.") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
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
    if lora is not None:
        model = add_adapters(model, lora)
    economise(model, memory or MemoryConfig())
    return model.to(device).eval()


def _config(path: str | Path) -> Any:
    """The model's config; one sentence if there is none."""
    folder = Path(path)
    local = folder.exists() or folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1
    if local and not (folder / "config.json").is_file():
        what = "no such folder" if not folder.exists() else "it has no config.json"
        if (folder / "adapter_config.json").is_file():
            what = "it holds an adapter alone; `llmgym export` folds it into a model"
        raise ConfigError(f"model: {str(path)!r} is not a model folder: {what}.")
    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model: {str(path)!r} is neither a model folder nor a hub id that can be read ({reason})."
        ) from error


# --- in and out --------------------------------------------------------------------------------------------


def merged(model: Any) -> Any:
    """A plain copy with the adapters folded in; the model itself is only read.

    Folding in place and back would leave rounding errors in the base weights. If it is split over several processes,
    each of them must ask, and gets the whole.
    """
    if getattr(base_of(model), "quantization_method", None) is not None or is_sharded(base_of(model)):
        return _rebuilt(model)
    plain = copy.deepcopy(model)
    return plain.merge_and_unload() if hasattr(plain, "peft_config") else plain


def _rebuilt(model: Any) -> Any:
    """A model of numbers from one in 4 bits, or split over processes, adapters folded in, in float32 on the CPU."""
    base = base_of(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    copy_weights(plain, plain_tensors(model))
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.eval()


@torch.no_grad()
def plain_tensors(model: Any, *, adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The weights by their names in the plain model, one tensor at a time; adapters folded in, or left out.

    Tensors that are split over several processes come whole; then all of these must go through them together.
    """
    base = base_of(model)
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or ".weight." in name:  # an adapter's, or the scales of 4 bits
            continue
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            layer = base.get_submodule(path.removesuffix(".base_layer"))
            tensor = weight_of(layer, adapters=adapters)
        yield name.replace(".base_layer.", "."), whole(tensor.detach())


def adapter_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors by the names that peft saves them under, and its `adapter_config.json` as a mapping.

    Tensors come whole, as from `plain_tensors`.
    """
    import peft

    config = next(iter(model.peft_config.values())).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {name: whole(t.detach()) for name, t in peft.get_peft_model_state_dict(model).items()}, plain


def export(model: Any, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a Hugging Face folder, adapters folded in, converted to `dtype` if given."""
    plain = merged(model)
    (plain if dtype is None else plain.to(dtype)).save_pretrained(str(folder))
