"""Supervised fine-tuning on chats: only what the assistant said is trained, rows are packed.

    from llm_gym.harness.sft import SFTConfig, sft
    sft(SFTConfig(data="chats.jsonl", steps=200, out="runs/sft"))

A line of data is `{"messages": [...], "tools": [...]}`, tools optional. Contexts come from
`llm_gym.chat`, the code that environments use, so the model is trained on exactly the ids that it will
read later, and every assistant message ends in the stop token that it must learn to draw.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.core import Message, Row
from llm_gym.errors import ConfigError, DataError
from llm_gym.harness.batching import Batch, Sample, pack
from llm_gym.harness.checkpoint import RunFolder
from llm_gym.harness.config import dump
from llm_gym.harness.learner import Learner
from llm_gym.harness.optimizers import OptimizerConfig
from llm_gym.harness.losses import LossConfig
from llm_gym.harness.model import LoraConfig, export, load_model, new_model

Example = Mapping[str, Any]
"""`{"messages": [...], "tools": [...] | None}`."""


@dataclass(frozen=True)
class SFTConfig:
    """Everything that decides a fine-tuning run."""

    data: str | None = None
    """A .jsonl file of chats; None: examples are passed in Python."""
    model: str | None = None
    """Folder or hub id of the model; None: the embedded one."""
    init: Mapping[str, Any] = field(default_factory=dict)
    """A Hugging Face config (`model_type` and its fields) to start from random weights; empty: load the weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None: the model's."""
    out: str | None = None
    """Run folder: config.yaml, metrics.jsonl and, at the end, the model in model/; None: write nothing."""
    steps: int = 200
    """Optimizer steps."""
    examples_per_step: int = 64
    """Chats per optimizer step; the data is shuffled anew in every pass."""
    max_length: int = 4096
    """Longer chats are left out (and counted in the first row of metrics)."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Its lr: None means 1e-5 (1e-4 with LoRA, 2e-3 from random weights)."""
    lora: LoraConfig | None = None
    """Low-rank adapters; None trains every weight."""
    token_budget: int = 16384
    """Most tokens in one micro-batch; the gradient does not depend on it."""
    save_dtype: str = "float32"
    """Type of the weights written at the end."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""

    def __post_init__(self) -> None:
        for name in ("steps", "examples_per_step", "max_length", "token_budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, want at least 1.")
        if self.init and self.model:
            raise ConfigError(f"init: starts from random weights, but model={self.model!r} was given; set one of them.")

    def resolved(self) -> OptimizerConfig:
        """The optimizer's settings with the learning rate settled."""
        chosen = 2e-3 if self.init else 1e-4 if self.lora else 1e-5
        return replace(self.optimizer, lr=chosen if self.optimizer.lr is None else self.optimizer.lr)


def sft(
    config: SFTConfig,
    examples: Sequence[Example] | Callable[[int], Sequence[Example]] | None = None,
    *,
    model: Any = None,
    progress: bool = True,
) -> Any:
    """Fine-tunes a model and returns it.

    Args:
        config: every decision of the run.
        examples: chats instead of `config.data`; a function gives the chats of a step (generated data).
        model: a model from an earlier call, trained on in place (its tokenizer must be `config`'s).
        progress: whether to show a progress bar.

    Raises:
        SettingError: settings or data that cannot work, before the model is loaded.
    """
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    draw, dropped = _source(config, examples, tokenizer)
    run = _open(config)
    learner = Learner(
        model if model is not None else _model(config),
        config.resolved(),
        LossConfig(name="sft"),
        total_steps=config.steps,
    )
    with _bar(config.steps, progress) as advance:
        for step in range(config.steps):
            row = _train_step(learner, draw(step), step) | ({"data/dropped": dropped} if step == 0 else {})
            advance(row)
            if run is not None:
                run.log(row)
    if config.out is not None:
        save(learner.model, tokenizer, Path(config.out) / "model", config.save_dtype)
    return learner.model


def encode(example: Example, tokenizer: Any) -> Row:
    """A chat as a training row: trained where the assistant speaks, stop tokens included.

    Contexts are extended exactly as in an episode, so a chat that an environment could have produced
    becomes the very ids that the environment would have shown.

    Raises:
        DataError: the chat does not begin with another's message or has no assistant message.
        TemplateError: the template refuses it.
    """
    messages, tools = list(example["messages"]), example.get("tools")
    chat = load_chat(tokenizer, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise DataError(f"messages: want a prompt and then an assistant message, got roles {_roles(messages)}.")
    parts = [chat.open(messages[: turns[0]])]
    for turn, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        parts.append(chat.encode_reply(reply_text(messages[turn])))
        if following == len(messages):
            break  # what is said after the last reply trains nothing
        parts.append(chat.extend(parts[-1], messages[turn + 1 : following]))
    tokens = np.concatenate(parts).astype(np.int32)
    trained = np.repeat([i % 2 == 1 for i in range(len(parts))], [len(p) for p in parts])
    turn_of = np.repeat([i // 2 if i % 2 else -1 for i in range(len(parts))], [len(p) for p in parts])
    nothing = np.zeros(len(tokens), np.float32)
    return Row(tokens, trained, nothing, np.where(trained, 0, -1).astype(np.int32), turn_of.astype(np.int32))


def reply_text(message: Message) -> str:
    """The text of an assistant message, as the model would write it.

    Raises:
        DataError: it has structured tool calls; how a model spells those is its template's affair, so the
            data must hold the text itself.
    """
    content = message.get("content")
    if message.get("tool_calls") or not isinstance(content, str):
        raise DataError("messages: an assistant message must be plain text, tool calls spelled out as the model does.")
    return content


def save(model: Any, tokenizer: Any, folder: Path, dtype: str = "float32") -> None:
    """Writes model and tokenizer as one Hugging Face folder."""
    import torch

    export(model, folder, dtype=getattr(torch, dtype))
    tokenizer.save_pretrained(str(folder))


def read_examples(path: str | Path) -> list[Example]:
    """The chats of a .jsonl file.

    Raises:
        DataError: the file cannot be read, or a line is no chat; the text names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"data: cannot read {str(path)!r} ({error.strerror}).") from error
    examples: list[Example] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise DataError(f"data: line {number} of {str(path)!r} is not JSON ({error}).") from error
        if not isinstance(example, dict) or not isinstance(example.get("messages"), list):
            raise DataError(f"data: line {number} of {str(path)!r} has no list of messages.")
        examples.append(example)
    if not examples:
        raise DataError(f"data: {str(path)!r} holds no chat.")
    return examples


# Inside


def _train_step(learner: Learner, batch: Batch, step: int) -> dict[str, float]:
    started = time.perf_counter()
    metrics = learner.step(batch)
    seconds = time.perf_counter() - started
    names = {"policy/loss": "loss", "policy/grad_norm": "grad_norm", "policy/lr": "lr", "policy/entropy": "entropy"}
    row = {short: metrics[name] for name, short in names.items() if name in metrics}
    return {"step": step + 1, **row, "tokens/trained": metrics["tokens/trained"], "time/step": seconds}


def _source(config: SFTConfig, examples: Any, tokenizer: Any) -> tuple[Callable[[int], Batch], int]:
    """(the batch of a step, chats left out as too long)."""
    if callable(examples):
        made = examples
        return lambda step: _pack([encode(e, tokenizer) for e in made(step)], config), 0
    if examples is None:
        if config.data is None:
            raise ConfigError("data: got None, want a .jsonl file of chats.")
        examples = read_examples(config.data)
    rows = [encode(example, tokenizer) for example in examples]
    short = [row for row in rows if len(row.tokens) <= config.max_length]
    if not short:
        raise DataError(f"data: every chat is longer than max_length={config.max_length}.")
    stream = _order(len(short), config)
    return lambda step: _pack([short[i] for i in next(stream)], config), len(rows) - len(short)


def _order(count: int, config: SFTConfig) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of each step: passes over the data, each shuffled by (seed, pass), cut across their ends."""
    waiting = np.empty(0, np.int64)
    epoch = 0
    while True:
        while len(waiting) < config.examples_per_step:
            shuffled = np.random.default_rng([config.seed, epoch]).permutation(count)
            waiting, epoch = np.concatenate([waiting, shuffled]), epoch + 1
        yield waiting[: config.examples_per_step]
        waiting = waiting[config.examples_per_step :]


def _pack(rows: Sequence[Row], config: SFTConfig) -> Batch:
    return pack([Sample(row, 1.0, i) for i, row in enumerate(rows)], max_tokens=config.token_budget)


def _model(config: SFTConfig) -> Any:
    import torch

    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if config.init:
        return new_model(config.init, seed=config.seed, device=device)
    return load_model(config.model, device=device, lora=config.lora)


def _open(config: SFTConfig) -> RunFolder | None:
    if config.out is None:
        return None
    run = RunFolder(config.out)
    run.start(dump(config))
    return run


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A progress bar; what it yields shows a row of metrics."""
    columns = (TextColumn("sft"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as progress:
        task = progress.add_task("sft", total=steps, what="")

        def show(row: Mapping[str, float]) -> None:
            speed = row["tokens/trained"] / row["time/step"]
            progress.update(task, advance=1, what=f"loss {row['loss']:.4f}  {speed:,.0f} tokens/s")

        yield show
