"""From a checkpoint to a folder that plain transformers, peft and vLLM load, with its tokenizer and its history."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm_gym import embedded
from llm_gym.chat import load_chat
from llm_gym.errors import CheckpointError, ConfigError, TemplateError, unknown
from llm_gym.harness.runs.lineage import Source, locate
from llm_gym.harness.runs.model_card import card
from llm_gym.harness.runs.run_folder import put
from llm_gym.models.plain import BASE, fold, is_adapter
from llm_gym.tokenizer import declared_stops, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER = "adapter_model.safetensors"


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    chat_template: str | Path | None = None,
) -> Source:
    """Writes the model of a run as a folder of its own.

    Args:
        run: a run folder (of `llmgym sft`, `train`, `distill` or `run`), or a checkpoint in one.
        out: a new folder; it appears whole or not at all.
        step: the checkpoint of a run folder; None: the newest.
        adapter: write the low-rank adapter alone, for peft; else it is folded into the weights.
        dtype: `float32`, `bfloat16` or `float16`; None: as the checkpoint has them.
        chat_template: as `load_tokenizer` takes it; None: the run's.

    Returns:
        What was written.

    Raises:
        CheckpointError: no such run or checkpoint, `out` holds something already, or cannot be written.
        ConfigError: an unknown dtype or template, or no adapter where one was asked for.
    """
    source, out = locate(run, step), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    if adapter and not source.tuned:
        raise ConfigError(f"adapter: the run {str(run)!r} trained whole weights and has none; leave --adapter out.")
    if adapter and source.base is not None and is_adapter(source.base):
        raise ConfigError(f"adapter: that of {str(run)!r} lies on another run's adapter; leave --adapter out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"out: {str(out)!r} holds something already; name a new folder.")
    if chat_template is not None:
        load_tokenizer(source.folder, chat_template)  # before anything is written
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with put("out", out):
            partial.mkdir(parents=True)
            if adapter:
                _write_adapter(source, partial, DTYPES.get(dtype or ""))
            else:
                _write_model(source, partial, DTYPES.get(dtype or ""), chat_template)
            load_tokenizer(source.folder, chat_template).save_pretrained(partial)
            (partial / "README.md").write_text(card(source, out.name, adapter=adapter), "utf-8")
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source


def checkpoint_model(source: Source) -> Any:
    """The plain model of a checkpoint on the CPU, its adapter folded in.

    Raises:
        CheckpointError: a file is missing or of another model.
    """
    from transformers import AutoModelForCausalLM

    try:
        if not source.tuned:
            return AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
        return fold(source.folder, source.base or embedded.PATH)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"checkpoint: {str(source.folder)!r} cannot be read ({reason}).") from error


def stop_ids(tokenizer: Any) -> list[int]:
    """Every id that ends a completion, the one that the chat template puts behind a reply first."""
    try:
        return list(load_chat(tokenizer).stop_ids)
    except TemplateError:
        return list(declared_stops(tokenizer))


# Inside


def _write_model(source: Source, folder: Path, dtype: torch.dtype | None, chat_template: str | Path | None) -> None:
    """Weights, config.json, and generation_config.json with every stop id."""
    model = checkpoint_model(source)
    tokenizer, generation = load_tokenizer(source.folder, chat_template), model.generation_config
    stops = stop_ids(tokenizer)
    if stops:
        generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)


def _write_adapter(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """The adapter's two files; its base is named as the run was told it, never as a path inside the package."""
    tensors = load_file(source.folder / ADAPTER)
    made = tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(made, folder / ADAPTER, metadata={"format": "pt"})
    config: Mapping[str, Any] = json.loads((source.folder / "adapter_config.json").read_text("utf-8"))
    text = json.dumps({**config, "base_model_name_or_path": source.base}, indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", "utf-8")
    if (source.folder / BASE).is_file():
        shutil.copy(source.folder / BASE, folder)
