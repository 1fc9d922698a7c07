"""README.md of an exported model: what it was made from, how, and what it scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import llm_gym
from llm_gym.harness.runs.lineage import Source, lineage
from llm_gym.harness.runs.run_folder import RunFolder

EMBEDDED = "the embedded model of llm_gym"
VERBS = {"sft": "supervised fine-tuning", "train": "reinforcement learning", "distill": "on-policy distillation"}
FACTS: dict[str, tuple[str, ...]] = {
    "sft": (
        "dataset", "split", "examples_per_step", "max_length", "seed", "optimizer.name", "optimizer.lr", "lora.rank",
    ),
    "train": (
        "env", "env_args", "prompts_per_step", "group_size", "advantage", "loss.name", "loss.kl", "sampling.max_tokens",
        "seed", "optimizer.name", "optimizer.lr", "lora.rank",
    ),
    "distill": (
        "env", "env_args", "distill.teacher", "distill.kl", "prompts_per_step", "group_size", "sampling.max_tokens",
        "seed", "optimizer.name", "optimizer.lr", "lora.rank",
    ),
}  # fmt: skip
"""Settings that the card names, by what the run was."""


def card(source: Source, name: str, *, adapter: bool) -> str:
    """The text of README.md.

    Only what the user named is in it (data sets, models); no other path, and nothing of the machine.

    Args:
        source: the model.
        name: of the exported folder.
        adapter: whether the adapter alone was exported.
    """
    runs = lineage(source)
    hub = source.base if adapter else runs[0].base
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if hub is not None and hub.count("/") == 1 and not Path(hub).exists():
        front["base_model"] = hub
    front["tags"] = ["llm-gym", *dict.fromkeys(VERBS[run.kind].replace(" ", "-") for run in runs)]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"Made with llm_gym {llm_gym.__version__} from {_named(runs[0].base)}.",
        "## How",
        *(_stage(number, run) for number, run in enumerate(runs, 1)),
        *_evaluation(source),
        "## Use",
        _use(source, adapter),
    ]
    return "\n\n".join(parts) + "\n"


def _stage(number: int, run: Source) -> str:
    """One run: what it was, and its settings."""
    rows = [(name, _get(run.config, name)) for name in FACTS[run.kind]]
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows if value not in (None, {}, "none")]
    head = f"{number}. {VERBS[run.kind].capitalize()}, {run.step:,} steps"
    return "\n".join([f"{head}\n", "| setting | value |", "|---|---|", *lines])


def _evaluation(source: Source) -> list[str]:
    """What the last run measured, before it and at the exported step."""
    rows = [row for row in RunFolder(source.run).metrics() if row["step"] <= source.step]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    lines = []
    for name in names:
        seen = [row for row in rows if isinstance(row.get(name), int | float)]
        if seen and not re.search(r"_low$|_high$|_stop/|eval/time|eval/tokens", name):
            before = _value(seen[0], name) if seen[0]["step"] == 0 else ""
            lines.append(f"| {name} | {before} | {_value(seen[-1], name)} | {seen[-1]['step']:,} |")
    if not lines:
        return []
    return ["## Evaluation", "\n".join(["| metric | before | after | at step |", "|---|---|---|---|", *lines])]


def _value(row: Mapping[str, Any], name: str) -> str:
    """A metric with its interval, where it has one."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return f"{row[name]:.4g}" if low is None or high is None else f"{row[name]:.4g} ({low:.4g} to {high:.4g})"


def _use(source: Source, adapter: bool) -> str:
    if adapter:
        held = _get(source.config, "lora.base")
        base = _named(source.base) + (f", held as {held} (base.json)" if held not in (None, "float32") else "")
        return (
            "```python\n"
            "from peft import PeftModel\n"
            f"model = PeftModel.from_pretrained(base, FOLDER)  # base: {base}, loaded with transformers\n"
            "```\n\n"
            "vLLM: `vllm serve BASE --enable-lora --lora-modules name=FOLDER`."
        )
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)\n"
        "```\n\n"
        "vLLM: `vllm serve FOLDER`. Measured again: `llmgym eval --model FOLDER --env ENV`."
    )


def _named(base: str | None) -> str:
    return EMBEDDED if base is None else f"`{base}`"


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    """A setting by its dotted name; None where there is none."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _cell(value: Any) -> str:
    """A value as one cell of a table."""
    text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
