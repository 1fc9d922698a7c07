"""Supervised fine-tuning on chats: only what the assistant said is trained, rows are packed.

    from llm_gym.harness.loops.sft import SFTConfig, sft
    sft(SFTConfig(dataset="chats.jsonl", steps=200, out="runs/sft"))

What a row of the data may hold is in `chats`. The loss of a step is the mean over all its trained tokens, however
they were split into micro-batches and over processes; so is that of an evaluation, over the whole held-out set.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from llm_gym.chat import load_tokenizer
from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.batching.shards import deal, dummy_batches, pack_shard
from llm_gym.harness.data.sft_examples import Example, encode, encode_all, load_examples
from llm_gym.harness.distributed.fsdp import is_sharded
from llm_gym.harness.distributed.world import World, connect
from llm_gym.harness.learner import weights
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import check_optimizer
from llm_gym.harness.learner.token_budget import Budget
from llm_gym.harness.loops.progress import Bar, wanted
from llm_gym.harness.loops.resuming import Opened, open_run
from llm_gym.harness.loops.sft_config import SFTConfig as SFTConfig
from llm_gym.harness.loops.sft_config import SFTEvalConfig as SFTEvalConfig
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.model.layers import base_of
from llm_gym.harness.model.loading import check_model, load_model, merged, new_model
from llm_gym.harness.runs.run_folder import NonZeroRankRunFolder, RunFolder
from llm_gym.harness.settings import dump
from llm_gym.harness.types import Batch, TrainSequence

MODEL = "model"
"""Folder of the finished model, in the run folder."""


@dataclass(frozen=True)
class Data:
    """What a run reads, as token ids; the same on every rank."""

    draw: Callable[[int], list[TrainSequence]]
    """The rows of a step, a function of the step alone."""
    steps: int
    """Optimizer steps of the run."""
    held_out: Sequence[TrainSequence]
    """What the loss is measured on; may be empty."""
    notes: tuple[str, ...]
    """What a person should know of it."""
    counts: Mapping[str, int]
    """The same as metrics."""


def sft(
    config: SFTConfig,
    examples: Sequence[Example] | Callable[[int], Sequence[Example]] | None = None,
    *,
    model: Any = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Any:
    """Fine-tunes a model and returns it; started by torchrun, together with the other processes.

    Args:
        config: every decision of the run.
        examples: chats instead of `config.dataset`; a function gives the chats of a step (generated data), and is
            called by the first process alone.
        model: a model from an earlier call, trained on in place (its tokenizer must be `config`'s).
        resume: go on from the newest checkpoint in `config.out`, or from the start if there is none yet.
        progress: whether to show how far it is; None: on a terminal and in a notebook.

    Raises:
        SettingError: settings or data that cannot work, before the model is loaded.
        CheckpointError: the folder already holds a run, and `resume` is not set.
        RankError: another process is gone or stuck.
    """
    world, run = connect(config.parallel, device_of(config.device)), None
    try:
        config = world.on_rank0(config.as_begun, "reading the run's settings") if resume else config
        said, config = config.rates(model).words(config.optimizer), config.resolved(model)
        check_sft(config, model, world.device)
        tokenizer = load_tokenizer(config.tokenizer or config.model, config.chat_template)
        data = prepare(config, examples, tokenizer, world)
        run, opened = _open(config, resume, data.steps, world)
        config, saved = opened.config, opened.checkpoint
        with (
            _bar(data, opened.step, wanted(progress) and world.rank == 0) as (tell, advance),
            world.blame_lost_rank("fine-tuning"),
        ):
            for text in filter(None, (f"sft: {said}.", opened.note)):
                tell(text)
            learner = Learner(
                _model(config, world, model),
                config.optimizer,
                LossConfig(name="sft"),
                total_steps=data.steps,
                world=world,
            )
            if saved is not None:
                weights.restore(learner, saved)
            _fine_tune(config, Budget(config.token_budget, learner, tell), data, run, advance)
        if run is not None:
            with run.writing():
                save(learner.model, tokenizer, run.path / MODEL, config.save_dtype, world)
        return learner.model
    finally:
        world.close()
        if run is not None:
            run.release()


def _fine_tune(
    config: SFTConfig, budget: Budget, data: Data, run: RunFolder | None, advance: Callable[[Mapping[str, Any]], None]
) -> None:
    """The remaining steps."""
    learner = budget.learner
    pack = partial(pack_rows, budget)
    held_out = pack(data.held_out) if data.held_out else None
    if run is not None:
        run.write_config(dump(replace(config, token_budget=budget.tokens)))  # resumed, it packs its rows alike
        if learner.step_count == 0 and held_out is not None:
            run.log({"step": 0, **held_out_loss(learner, held_out)})
    write = partial(weights.save, learner, load_tokenizer(config.tokenizer or config.model, config.chat_template))
    for step in range(learner.step_count, data.steps):
        row = train_step(budget, data, step)
        if held_out is not None and _due(config.eval.every, step + 1, data):
            row |= held_out_loss(learner, held_out)
        advance(row)
        if run is not None:
            run.log(row)
        if run is not None and _due(config.checkpoint.every, step + 1, data):
            run.save(step + 1, write, keep=config.checkpoint.keep)


def prepare(config: SFTConfig, examples: Any, tokenizer: Any, world: World | None = None) -> Data:
    """Reads and encodes everything that the run will see.

    Args:
        config: the run's.
        examples: see `sft`.
        tokenizer: the model's.
        world: the processes that train together; each encodes everything.

    Raises:
        SettingError: data that cannot be read or trained on; the sentence names the row.
    """
    if callable(examples):
        made, alone = examples, world or World()
        return Data(
            lambda step: [encode(e, tokenizer) for e in alone.on_rank0(lambda: made(step), "making chats")],
            config.steps,
            _held_out(config, tokenizer),
            (),
            {},
        )
    if examples is None and config.dataset is None:
        raise ConfigError("dataset: got None, want a hub id or a file of chats.")
    where = repr(config.dataset) if examples is None else "the examples"
    chats = _load(config, str(config.dataset), config.split) if examples is None else examples
    rows, counts = encode_all(chats, tokenizer, max_length=config.max_length, cut=config.long == "cut", where=where)
    held_out = _held_out(config, tokenizer)
    known = {row.tokens.tobytes() for row in rows}
    counts["also_held_out"] = sum(row.tokens.tobytes() in known for row in held_out)
    steps = config.steps if config.epochs is None else math.ceil(config.epochs * len(rows) / config.examples_per_step)
    said = {
        "dropped": f"{{}} of {len(chats)} chats are longer than {config.max_length} tokens, and dropped",
        "cut": f"{{}} of {len(chats)} chats are longer than {config.max_length} tokens, and cut",
        "also_held_out": f"{{}} of {len(held_out)} held-out chats are trained on too",
    }
    return Data(
        lambda step: [rows[i] for i in indices(step, len(rows), config)],
        steps,
        held_out,
        tuple(text.format(counts[name]) for name, text in said.items() if counts[name]),
        {f"data/{name}": count for name, count in counts.items()},
    )


def check_sft(config: SFTConfig, model: Any = None, device: torch.device | str = "cpu") -> None:
    """Looks at all that needs neither data nor weights.

    Raises:
        SettingError: a model, a layer or an optimizer that is not there.
    """
    check_optimizer(config.optimizer)
    if model is None and not config.init:
        check_model(config.model, lora=config.lora, memory=config.memory, device=device)


def held_out_loss(learner: Learner, batch: Batch) -> dict[str, float]:
    """Cross-entropy per trained token over a whole set, in nats, and its exponential, the perplexity.

    Every token weighs the same, so the numbers do not depend on how the set was packed, or dealt to processes.
    """
    idle, total = dummy_batches(learner.world, len(batch.micro)), 0.0
    for micro in batch.micro:
        logprobs, _ = learner.logprobs(micro, entropy=False)
        total -= float(logprobs.double().sum())
    for micro in idle:
        learner.logprobs(micro, entropy=False)
    loss = learner.world.add({"loss": total}, "evaluation")["loss"] / batch.tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/tokens": float(batch.tokens)}


def indices(step: int, count: int, config: SFTConfig) -> npt.NDArray[np.int64]:
    """The rows of a step: passes over the data, each shuffled by (seed, pass), cut across their ends."""
    places = np.arange(step * config.examples_per_step, (step + 1) * config.examples_per_step)
    passes = [np.random.default_rng([config.seed, p]).permutation(count) for p in np.unique(places // count)]
    chosen: npt.NDArray[np.int64] = np.concatenate(passes)[places - places[0] // count * count]
    return chosen


def save(model: Any, tokenizer: Any, folder: Path, dtype: str = "float32", world: World | None = None) -> None:
    """Writes model and tokenizer as one Hugging Face folder, adapters folded in; the first process does.

    Every process calls it: of a split model each has a part.
    """
    world = world or World()
    plain = merged(model) if world.sharded or world.rank == 0 else model
    if world.rank == 0:
        plain.to(getattr(torch, dtype)).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


# Inside


def train_step(budget: Budget, data: Data, step: int) -> dict[str, Any]:
    """One optimizer step on the rows of that step; returns its row of metrics."""
    batch, started = pack_rows(budget, data.draw(step)), time.perf_counter()
    metrics = budget.step(batch, temperature=1.0)
    seconds = {"time/step": time.perf_counter() - started}
    names = {"policy/loss": "loss", "policy/grad_norm": "grad_norm", "policy/lr": "lr", "policy/entropy": "entropy"}
    row = {short: metrics[name] for name, short in names.items() if name in metrics}
    row |= {"tokens/trained": metrics["tokens/trained"], **budget.learner.world.reduce_max(seconds, "a step")}
    return {"step": step + 1, **row, **(data.counts if step == 0 else {})}


def _due(every: int, step: int, data: Data) -> bool:
    return step == data.steps or (every > 0 and step % every == 0)


def _load(config: SFTConfig, dataset: str, split: str) -> list[Example]:
    return load_examples(
        dataset, split, subset=config.subset, columns=config.columns, system_prompt=config.system_prompt
    )


def _held_out(config: SFTConfig, tokenizer: Any) -> list[TrainSequence]:
    """What the loss is measured on."""
    dataset = config.eval.dataset or config.dataset
    if dataset is None or not (config.eval.dataset or config.eval.split):
        return []
    chats = _load(config, dataset, config.eval.split or "train")
    rows, _ = encode_all(
        chats, tokenizer, max_length=config.max_length, cut=config.long == "cut", where=f"eval.dataset {dataset!r}"
    )
    return rows


def pack_rows(budget: Budget, rows: Sequence[TrainSequence]) -> Batch:
    """This process's share of the rows, packed."""
    world = budget.learner.world
    mine = deal(world, [replace(row, episode=i) for i, row in enumerate(rows)])
    return pack_shard(world, mine, max_tokens=budget.tokens)


def _model(config: SFTConfig, world: World, model: Any) -> Any:
    """What is trained: the model given, or that of the settings."""
    if model is not None and is_sharded(base_of(model)):
        raise ConfigError("model: got one that a former run has split over processes; load what that run has written.")
    if model is not None:
        return model
    device = "cpu" if world.sharded else world.device  # parts go where they belong when it is split
    if config.init:
        return new_model(config.init, seed=config.seed, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # new adapters are drawn
        return load_model(config.model, device=device, lora=config.lora, memory=config.memory)


def _open(config: SFTConfig, resume: bool, steps: int, world: World) -> tuple[RunFolder | None, Opened[SFTConfig]]:
    """The run folder, and what it goes on from."""
    if config.out is None:
        return None, Opened(None, config)
    run = RunFolder(config.out) if world.rank == 0 else NonZeroRankRunFolder(config.out)

    def begin() -> Opened[SFTConfig]:
        opened = open_run(run, config, resume=resume, steps=steps)
        if opened.step < steps:
            shutil.rmtree(run.path / MODEL, ignore_errors=True)  # of fewer steps; one that is there is a finished one
        return opened

    return run, world.on_rank0(begin, "opening the run folder")


@contextmanager
def _bar(
    data: Data, start: int, shown: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[Mapping[str, Any]], None]]]:
    """A progress bar under what is to be known of the data; yields what says a line, and what shows a row."""
    bar = Bar("sft", data.steps, start, console=Console(highlight=False, soft_wrap=True), shown=shown)

    def show(row: Mapping[str, Any]) -> None:
        held_out = f", held-out {row['eval/loss']:.4f}" if "eval/loss" in row else ""
        speed = row["tokens/trained"] / row["time/step"]
        bar.start()
        bar.step(row["step"], f"loss {row['loss']:.4f}{held_out}, {speed:,.0f} tokens/s")

    for note in data.notes:
        bar.say(f"sft: {note}.")
    try:
        yield bar.say, show
    finally:
        bar.stop()
