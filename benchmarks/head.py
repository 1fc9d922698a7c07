"""Loss head at vocabulary 32k: the tiled log-probabilities against naive full logits.

    OMP_NUM_THREADS=1 python benchmarks/head.py [--tokens 4096] [--hidden 384] [--vocabulary 32768] [--repeats 5]

One process, both warm, runs alternating; each is forward and backward of a policy-gradient sum over
16 x 256 tokens, gradients of hidden states and head weights included. Time is process CPU time, memory the
growth of the resident set at its peak (VmHWM, reset before each run; CUDA's own peak on a GPU). Medians.
Target: time <= 1.0x, memory <= 0.3x.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llm_gym.harness.logprobs import token_logprobs

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Full logits, log-softmax, gather."""
    return torch.nn.functional.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def tiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours, without the entropy, as the naive one."""
    return token_logprobs(hidden, weight, targets, entropy=False)[0]


def tiled_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours as the learner calls it: the entropy is computed as a metric."""
    return token_logprobs(hidden, weight, targets)[0]


def naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Naive, the entropy computed as a metric."""
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        (logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0]


class Memory:
    """Growth of the peak since construction, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.base = _resident("VmRSS")

    def peak(self) -> int:
        """Bytes above the start."""
        now = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _resident("VmHWM")
        return now - self.base


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds once the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, credit: Tensor) -> tuple[float, int]:
    """(seconds, peak bytes) of one forward and backward."""
    hidden.grad = weight.grad = None
    memory, started = Memory(hidden.device), clock(hidden.device)
    (head(hidden, weight, targets) * credit).sum().backward()
    return clock(hidden.device) - started, memory.peak()


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16 * 256)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    hidden = torch.randn(args.tokens, args.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocabulary, args.hidden, device=device) / args.hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,), device=device)
    credit = torch.randn(args.tokens, device=device) / args.tokens
    heads: tuple[Head, ...] = (naive, tiled, naive_entropy, tiled_entropy)
    results: dict[str, list[tuple[float, int]]] = {head.__name__: [] for head in heads}
    for repeat in range(args.repeats + 1):
        for head in heads:
            result = measure(head, hidden, weight, targets, credit)
            if repeat:  # the first round warms up
                results[head.__name__].append(result)
    size = f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}"
    print(f"{size}, {args.dtype}, {args.device}, {args.threads} threads")
    for name, runs in results.items():
        seconds, peak = medians(runs)
        base_seconds, base_peak = medians(results["naive_entropy" if "entropy" in name else "naive"])
        print(
            f"{name:14s} {seconds:7.3f} s  {peak / 2**20:7.0f} MB"
            f"   {seconds / base_seconds:.2f}x time  {peak / base_peak:.2f}x memory"
        )


def medians(runs: list[tuple[float, int]]) -> tuple[float, float]:
    """Median seconds and peak bytes."""
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


if __name__ == "__main__":
    main()
