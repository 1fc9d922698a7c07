"""Prefix sharing: forward and backward of a 29.6M-parameter body, the same rows laid out in four ways.

    OMP_NUM_THREADS=1 python benchmarks/prefix_sharing.py [--blocks 5] [--shapes long tree] [--ways padded merge]

A Qwen3 with random weights (hidden 384, 8 layers, 6 heads of 64 and 2 key-value heads, vocabulary 32,000), no head.
The ways: `padded`, one row for each sequence, padded to the longest; `packed`, the rows end to end; `cat` and `merge`,
what rows begin with laid out once, by either form of attention. Every sequence's last token is only a target.

Every way runs once for its gradient, which is compared with that of the first way (largest difference of a tensor,
relative to its norm). Time is CPU seconds of this process: blocks in which the ways alternate, medians. Memory is the
growth of the resident set at its peak (VmHWM) in a forked child for each way and shape, which runs it once to warm up
and once more; parameters and their gradients are there before, and what is freed goes back to the system at once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from llm_gym.harness.batching.packing import pack
from llm_gym.harness.model.loading import Backbone, prepare
from llm_gym.harness.types import MicroBatch, TrainSequence

VOCABULARY = 32_000
WAYS = ("padded", "packed", "cat", "merge")


def shapes() -> dict[str, list[np.ndarray]]:
    """Name -> the tokens of every row."""
    rng = np.random.default_rng(0)

    def new(n: int) -> np.ndarray:
        return rng.integers(0, VOCABULARY, n).astype(np.int32)

    def group(prompt: int, completions: Any) -> list[np.ndarray]:
        start = new(prompt)
        return [np.concatenate([start, new(n)]) for n in completions]

    def turns(members: int, count: int, said: int) -> list[np.ndarray]:
        """Episodes that drop their thinking (half of what was said) from history: each turn is a row of its own."""
        prompt, rows = new(128), []
        for _ in range(members):
            history = prompt
            for _ in range(count):
                rows.append(np.concatenate([history, new(said)]))
                history = np.concatenate([history, rows[-1][-said // 2 :], new(24)])
        return rows

    return {
        "long": group(512, [129] * 8),
        "short": group(64, [33] * 8),
        "uneven": group(128, np.linspace(16, 250, 8).astype(int) + 1),
        "tree": turns(4, 3, 48),
    }


def samples(rows: list[np.ndarray]) -> list[TrainSequence]:
    """Rows whose last token only is trained: what is computed is all but that one."""
    made = []
    for i, tokens in enumerate(rows):
        made.append(TrainSequence(tokens, np.array([len(tokens) - 1]), {"old_logprobs": np.zeros(1)}, i))
    return made


def make_model(dtype: torch.dtype) -> Any:
    """The 29.6M-parameter model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return prepare(Qwen3ForCausalLM(config).to(dtype))


class Way:
    """One way to compute the body over these rows."""

    def __init__(self, name: str, body: Backbone, rows: list[np.ndarray]) -> None:
        self.name, self.backbone = name, body
        self.batch: MicroBatch
        (self.batch,) = pack(samples(rows), max_tokens=10**9, share=name in ("cat", "merge")).micro
        count = self.batch.trained
        self.weight = torch.randn(count, body.config.hidden_size, generator=torch.Generator().manual_seed(1))

    @property
    def tokens(self) -> int:
        """Computed, padding included."""
        batch = self.batch
        return max(batch.lengths) * len(batch.lengths) if self.name == "padded" else len(batch.tokens)

    def run(self) -> None:
        """Forward and backward of a weighted sum of the hidden states that predict the trained tokens."""
        body, batch = self.backbone, self.batch
        if self.name == "padded":
            body.causal.set_attn_implementation("sdpa")
            hidden = torch.cat(list(body.of(torch.split(batch.tokens, list(batch.lengths)), "padded")))
        else:
            body.causal.set_attn_implementation("llm_gym")
            body.form = "cat" if self.name == "cat" else "merge"
            hidden = body.hidden(batch)
        picked = hidden.index_select(0, batch.streams["source"])
        order = batch.streams["target"].argsort()  # the same rows whatever the layout (targets of random rows differ)
        (picked.index_select(0, order) * self.weight).sum().backward()

    def gradients(self) -> list[Tensor]:
        """Of one run."""
        self.backbone.model.zero_grad()
        self.run()
        return [p.grad.clone() for p in self.backbone.model.parameters() if p.grad is not None]


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak(way: Way) -> float:
    """Growth of the resident set at its peak in MiB, gradients already allocated."""
    libc = ctypes.CDLL(None)
    for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: freed tensors are not kept for later
        libc.mallopt(setting, 1 << 16)
    way.run()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = _resident("VmRSS")
    way.run()
    return (_resident("VmHWM") - base) / 2**20


def peak_of_child(way: Way) -> float:
    """`peak` in a process of its own: what other ways left in the allocator counts for nothing."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: theirs.send(peak(way)))
    child.start()
    found: float = ours.recv()
    child.join()
    return found


def seconds(ways: list[Way], blocks: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    taken: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways * blocks:
        start = time.process_time()
        way.run()
        taken[way.name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def gap(ways: list[Way]) -> dict[str, float]:
    """Largest relative difference of a gradient from those of the first way."""
    want = ways[0].gradients()
    return {
        way.name: max(float((a - b).norm() / b.norm()) for a, b in zip(way.gradients(), want, strict=True))
        for way in ways
    }


def report(shape: str, body: Backbone, rows: list[np.ndarray], blocks: int, names: list[str]) -> None:
    """One table; ratios are to the first way."""
    ways = [Way(name, body, rows) for name in names]
    first = names[0]
    memory = {way.name: peak_of_child(way) for way in ways}
    off, cpu = gap(ways), seconds(ways, blocks)
    print(f"\n{shape}: {len(rows)} rows of {min(map(len, rows)) - 1} to {max(map(len, rows)) - 1} tokens")
    print(f"{'':8}{'tokens':>8}{'CPU-s':>8}{'faster':>8}{'peak MiB':>10}{'of it':>8}{'gap':>10}   than {first}")
    for way in ways:
        n = way.name
        print(
            f"{n:8}{way.tokens:>8}{cpu[n]:>8.3f}{cpu[first] / cpu[n]:>8.2f}"
            f"{memory[n]:>10.0f}{memory[n] / memory[first]:>8.2f}{off[n]:>10.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["long", "short", "uneven", "tree"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ratios are to the first")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    body = Backbone(make_model(getattr(torch, arguments.dtype)))
    print(f"{arguments.dtype}, {arguments.blocks} blocks, 1 thread")
    for shape in arguments.shapes:
        report(shape, body, shapes()[shape], arguments.blocks, arguments.ways)


if __name__ == "__main__":
    main()
