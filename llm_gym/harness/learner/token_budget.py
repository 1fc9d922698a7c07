"""How many tokens a micro-batch may have: as given, or measured; halved when memory runs out anyway.

The gradient does not depend on it (see `batching`), only what fits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from llm_gym.errors import ShortOfMemory
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner import memory_probe
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OPTIMIZERS
from llm_gym.harness.types import Batch, MicroBatch, TrainSequence

USUAL = 16384
"""Tokens where nothing can be measured."""
LEAST, MOST = 1024, 65536
"""What a measured budget is held between; more tokens than that make no step faster."""
SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what may be used: on a CPU environments and tools live there too."""
PROBE = (1024, 3072)
"""Tokens of the two micro-batches that are measured."""
ROW = 512
"""Tokens of a row in them."""


class Budget:
    """The token budget of a run, and steps that keep to it.

    Args:
        tokens: of a micro-batch; "auto": what fits, found by running two micro-batches of random tokens. Do so when
            everything else (the engine!) has its memory.
        learner: whose steps they are.
        tell: is told, in a line, what was decided.
    """

    def __init__(self, tokens: int | str, learner: Learner, tell: Callable[[str], None]) -> None:
        self.learner, self.tell = learner, tell
        measured, why = (tokens, "") if isinstance(tokens, int) else self._measured()
        self.tokens = min(learner.world.gather(measured, "measuring memory"))
        if why:
            tell(f"memory: {why}: {self.tokens:,} tokens a micro-batch.")

    def step(self, batch: Batch, *, temperature: float) -> dict[str, float]:
        """`Learner.step`, as often as it takes to fit; nothing is counted twice.

        Raises:
            ShortOfMemory: even one row at a time does not fit.
        """
        while True:
            batch = split_to_budget(batch, self.tokens)
            try:
                return self.learner.step(batch, temperature=temperature)
            except ShortOfMemory as error:
                if torch.distributed.is_initialized():  # the other ranks are in the middle of the step
                    raise
                why = str(error)
            gc.collect()  # the failed micro-batch went with the error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(batch, why)

    def _halve(self, batch: Batch, why: str) -> None:
        """A budget that splits the largest micro-batch which is more than one row."""
        splittable = [len(micro.tokens) for micro in batch.micro if _rows(micro) > 1]
        if not splittable:
            longest = max(len(micro.tokens) for micro in batch.micro)
            raise ShortOfMemory(
                f"memory: a row of {longest:,} tokens does not fit alone ({why}); try memory.checkpointing=1, "
                "memory.offload=true, lora, or fewer tokens (sampling.max_tokens, max_length)."
            )
        self.tokens = max(splittable) // 2
        self.tell(f"memory: ran out; from now on {self.tokens:,} tokens a micro-batch, this step once more.")

    def _measured(self) -> tuple[int, str]:
        """What fits, and why so."""
        device = self.learner.device
        try:
            free, fixed, each = measure(self.learner)
        except memory_probe.Unknown as unknown:
            return USUAL, str(unknown)
        except ShortOfMemory:
            return LEAST, f"{PROBE[1]:,} tokens do not fit"
        sharing = 1 if device.type == "cuda" else self.learner.world.neighbours  # a GPU is one process's own
        tokens = int((SHARE[device.type] * free / sharing - fixed) / max(each, 1.0))
        tokens = min(MOST, max(LEAST, tokens - tokens % LEAST))
        shared = f" for {sharing} processes" if sharing > 1 else ""
        return tokens, f"{free / 2**30:,.1f} GiB free{shared}, {each / 1000:,.0f} kB a token"


def measure(learner: Learner) -> tuple[int, float, float]:
    """(free bytes, bytes that a step needs whatever its size, bytes for each token of a micro-batch).

    Gradients are allocated while the free memory is read. The optimizer's state, if there is none yet, is counted
    by `Optimizer.state`. The learner is left as it was.

    Raises:
        Unknown: this system does not say how much memory is free, or in use.
        ShortOfMemory: the probe does not fit.
    """
    small, large = (probe(learner, tokens) for tokens in PROBE)
    trained = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    stateless = not any(optimizer.state for optimizer in learner.optimizers)
    state = OPTIMIZERS[learner.settings.name].state * trained * stateless
    try:
        run(learner, small)
        free = memory_probe.free(learner.device)
        peaks = [memory_probe.peak(learner.device, partial(run, learner, batch)) for batch in (small, large)]
    finally:
        learner.model.zero_grad(set_to_none=True)
    tokens = [sum(len(micro.tokens) for micro in batch.micro) for batch in (small, large)]
    each = max(0.0, (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]))
    return free, state + max(0.0, peaks[0] - each * tokens[0]), each


def run(learner: Learner, batch: Batch) -> None:
    """Forward and backward, as in a step."""
    with memory_probe.all_or_nothing(learner.model):
        for micro in batch.micro:
            learner.dry_run(micro.to(learner.device))


def probe(learner: Learner, tokens: int, row: int = ROW) -> Batch:
    """One micro-batch of random tokens, all of them trained, in rows of `row` at most."""
    config: Any = learner.backbone.config
    length = min(row, getattr(config, "max_position_embeddings", None) or row)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(max(1, tokens // length)):
        ids = rng.integers(0, config.vocab_size, length + 1).astype(np.int32)
        known = {"old_logprobs": np.zeros(length), "advantages": np.ones(length)}
        rows.append(TrainSequence(ids, np.arange(1, length + 1), known, number))
    return pack(rows, max_tokens=1 << 62)


# --- smaller micro-batches --------------------------------------------------------------------------------


def split_to_budget(batch: Batch, tokens: int) -> Batch:
    """The batch with micro-batches of at most `tokens` tokens, or of one row; its gradient is the same."""
    parts = tuple(part for micro in batch.micro for part in _split(micro, tokens))
    return batch if len(parts) == len(batch.micro) else replace(batch, micro=parts)


def _rows(micro: MicroBatch) -> int:
    return int(micro.streams["sequence"].max()) + 1 if micro.trained else 0


def _split(micro: MicroBatch, tokens: int) -> Iterator[MicroBatch]:
    rows = _rows(micro)
    if len(micro.tokens) <= tokens or rows < 2:
        yield micro
        return
    for half in (range(rows // 2), range(rows // 2, rows)):
        yield from _split(only(micro, half), tokens)


def only(micro: MicroBatch, rows: range) -> MicroBatch:
    """Some consecutive rows of a micro-batch, with the pieces that they are made of, in the same order."""
    sequence = micro.streams["sequence"]
    trained = (sequence >= rows.start) & (sequence < rows.stop)
    lengths, parents = torch.tensor(micro.lengths), micro.parents or (-1,) * len(micro.lengths)
    streams = micro.streams.at(trained)
    source = streams["source"]
    wanted = set(torch.searchsorted(lengths.cumsum(0), source.cpu(), right=True).tolist())
    for piece in reversed(range(len(lengths))):  # a parent stands before its children
        if piece in wanted and parents[piece] >= 0:
            wanted.add(parents[piece])
    pieces = sorted(wanted)
    place = {-1: -1} | {piece: number for number, piece in enumerate(pieces)}
    kept = torch.zeros(len(lengths), dtype=torch.bool)
    kept[pieces] = True
    tokens = kept.repeat_interleave(lengths).to(micro.tokens.device)
    return replace(
        micro,
        tokens=micro.tokens[tokens],
        positions=micro.positions[tokens],
        lengths=tuple(micro.lengths[piece] for piece in pieces),
        parents=tuple(place[parents[piece]] for piece in pieces) if micro.parents else (),
        streams=streams.having(source=(tokens.cumsum(0) - 1)[source], sequence=streams["sequence"] - rows.start),
    )
