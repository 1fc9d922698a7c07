"""Plain models: what a trained model, or a saved adapter, is to tools that know nothing of adapters.

An adapter is a difference to the base that it was trained on. If that was held in fewer bits, those numbers are the
base: a checkpoint says how it was held (`BASE`), and whoever folds the adapter in holds the base so first.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llm_gym.embedded import PATH
from llm_gym.errors import PolicyError, SettingError
from llm_gym.models.folding import base_of, beneath, plain_tensors, untied
from llm_gym.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

HELD = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
"""How frozen weights are held -> their type; for `nf4`, of those that are not linear layers."""
BASE = "base.json"
"""File beside an adapter: the `model` that it was trained on (null: the embedded one), how that was `held`, and the
type of the `numbers` that its 4 bits stood for."""
ADAPTER = "adapter_config.json"

# bitsandbytes, which comes with peft, advises a faster kernel for 4 bits when it is imported: before every run with an
# adapter, whatever that is held in. All that imports peft imports this module first.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))


# A trained model


def plain_class(base: Any) -> Any:
    """The model's class; one that is split over processes has another in front of it."""
    return next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))


def plain_config(model: Any) -> Any:
    """The config of the plain model: no 4 bits, and no tie that an adapter has broken."""
    config = copy.deepcopy(base_of(model).config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied(model):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def as_saved(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors by the names, and in the form, in which `save_pretrained` writes them, and engines read them.

    A matrix that is tied to another is left out: some engines have no place for it (vLLM's Gemma 2). Where names differ
    from those in memory (experts that are fused there) it takes a layer at a time.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    base = base_of(model)
    if getattr(base, "quantization_method", None) is not None:  # its own would end in 4 bits again
        with torch.device("meta"):
            base = plain_class(base)(plain_config(model))
    tied = () if untied(model) else base.all_tied_weights_keys
    tensors = (item for item in tensors if item[0] not in tied)
    known = getattr(base, "_weight_conversions", None)
    if not (get_model_conversion_mapping(base, add_legacy=False) if known is None else known):
        yield from tensors
        return
    for _, layer in groupby(tensors, key=lambda item: _layer(item[0])):
        yield from revert_weight_conversion(base, dict(layer)).items()


def merged(model: Any, *, consume: bool = False) -> Any:
    """The plain model, adapters folded in: a copy in float32 at least, on the CPU; the model is only read.

    If it is split over several processes, each of them must ask, and gets the whole.

    Args:
        model: a trained model.
        consume: nobody needs `model` any more: its memory is used, and it is of no use afterwards.

    Raises:
        PolicyError: weights are missing, or have no place: peft has wrapped a module in a way that is not known.
    """
    base, config = base_of(model), plain_config(model)
    kind = torch.promote_types(beneath(base.get_input_embeddings(), adapters=False)[0].weight.dtype, torch.float32)
    tensors = as_saved(model, plain_tensors(model, consume=consume))
    state = {name: tensor.to("cpu", kind, copy=not consume) for name, tensor in tensors}
    how = {"config": config, "state_dict": state, "dtype": kind, "output_loading_info": True}
    with no_progress_bar():
        plain, found = plain_class(base).from_pretrained(None, **how)
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise PolicyError(f"model: {wrong[0]!r} and {len(wrong) - 1} more do not fit the plain {type(plain).__name__}.")
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.eval()


# On disk


def load_base(
    source: str | Path,
    held: str = "float32",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
) -> Any:
    """A causal language model whose weights are held as `held`; one in 4 bits is on `device` already.

    Args:
        source: a folder or a hub id; a folder that holds an adapter alone is folded first.
        held: a key of `HELD`.
        dtype: another type than that of `held`, where these are whole numbers of it (not in 4 bits).
        device: where weights are brought into 4 bits.
        config: the model's, if it is known already.

    Raises:
        SettingError: bitsandbytes is missing.
    """
    if held == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise SettingError(f"model: the base of {str(source)!r} is held in 4 bits, which needs bitsandbytes.")
        return _in_four_bits(source, device, config)
    if is_adapter(source):
        model = fold(source).to(dtype or HELD[held])
        model.name_or_path = str(source)  # what adapters on it are said to belong to
        return model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(source), config=config, dtype=dtype or HELD[held])


def fold(source: str | Path, base: str | Path | None = None) -> Any:
    """The plain model in float32 that a saved adapter (a folder or hub id) makes of its base, held as in training.

    `base`: where the base is, if not where the adapter says.
    """
    import peft

    config = peft.PeftConfig.from_pretrained(str(source))
    name, held, kind = recorded_base(Path(source))
    device = "cuda" if held == "nf4" and torch.cuda.is_available() else "cpu"
    made = peft.get_peft_model(load_base(base or name or PATH, held, device=device), config)
    for state in _states(made) if kind is not None else ():
        state.dtype = getattr(torch, str(kind))
    full_precision(made)
    peft.set_peft_model_state_dict(made, peft.load_peft_weights(str(source), device="cpu"))
    if untied(made):
        log.warning("%s: embedding and head, one matrix in its base, are two in the plain model.", source)
    return merged(made.eval(), consume=True)


@contextmanager
def plain_folder(source: str | Path | None) -> Iterator[str | Path | None]:
    """What an engine loads that knows no adapters: `source`, or a folder, while this lasts, with its adapter folded in.

    The folder holds the tokenizer too.
    """
    if source is None or not is_adapter(source):
        yield source
        return
    with tempfile.TemporaryDirectory() as scratch:
        fold(source).save_pretrained(scratch)
        load_tokenizer(source).save_pretrained(scratch)
        yield scratch


def full_precision(model: Any) -> None:
    """Adapters in float32 at least: peft makes some of them in the type of the weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def is_adapter(source: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (Path(source) / ADAPTER).is_file() and not (Path(source) / "config.json").is_file()


def record_base(model: Any, folder: Path) -> None:
    """Writes beside a saved adapter what it belongs on."""
    base = base_of(model)
    held = str(beneath(base.get_input_embeddings(), adapters=False)[0].weight.dtype).removeprefix("torch.")
    held = "nf4" if getattr(base, "quantization_method", None) is not None else held
    name = next(iter(model.peft_config.values())).base_model_name_or_path
    kinds = {str(state.dtype).removeprefix("torch.") for state in _states(base)}
    known = {"model": None if name == str(PATH) else name, "held": held, "numbers": min(kinds, default=None)}
    text = json.dumps(known, indent=2)
    (folder / BASE).write_text(text + "\n", "utf-8")


def recorded_base(folder: Path) -> tuple[str | None, str, str | None]:
    """What `BASE` says of the model that an adapter belongs on: name, how it was held, type of its numbers."""
    if (folder / BASE).is_file():
        found = json.loads((folder / BASE).read_text("utf-8"))
        return found["model"], found["held"], found["numbers"]
    import peft

    name = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    return name, _held_in_run(folder.resolve().parent.parent / "config.yaml"), None


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing a bar for every load, which would run into the trainer's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# Inside


def _states(model: Any) -> list[Any]:
    """What bitsandbytes knows of each weight in 4 bits."""
    return [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]


def _held_in_run(file: Path) -> str:
    """How the base was held in a run whose checkpoints do not say it: those of older versions."""
    import yaml

    config = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    lora = config.get("lora") if isinstance(config, dict) else None
    found = str((lora or {}).get("base", "float32"))
    if found not in HELD:
        raise SettingError(f"{str(file)!r}: lora.base is {found!r}, want one of {', '.join(HELD)}.")
    return found


def _in_four_bits(source: str | Path, device: torch.device | str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if is_adapter(source):  # weights are brought into 4 bits as they are read
        with tempfile.TemporaryDirectory() as scratch:
            fold(source).save_pretrained(scratch)
            model = _in_four_bits(scratch, device, None)
            model.name_or_path = str(source)
            return model
    slow = torch.device(device).type == "cpu"  # at bfloat16: products are of float32 there
    kind = torch.float32 if slow else HELD["nf4"]
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(source), config=config, dtype=HELD["nf4"], quantization_config=four, device_map={"": str(device)}
    )
    for module in model.modules():
        # Or bitsandbytes lays the weights out anew in a forward on a CPU, and what `numbers` reads is wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.quant_state = module.weight.quant_state  # a weight that is split forgets it
            module.quant_state.dtype = kind
    for parameter in model.parameters() if slow else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules() if slow else ():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's, rounded to bfloat16; a float32 model has all of it
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=module.embed_scale.device)
    return model


def _layer(name: str) -> str:
    """What a parameter's name begins with, the number of its layer included; else the whole."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
