"""The loss head against naive full logits, by time and memory.

    OMP_NUM_THREADS=1 python benchmarks/head.py [--vocabulary 32768] [--tokens 4096] [--hidden 384] [--repeats 5]
    OMP_NUM_THREADS=1 python benchmarks/head.py --vocabulary 151936 --tokens 2048

One process, all warm, runs alternating; each is forward and backward of a policy-gradient sum, gradients of hidden
states and head weights included. Ours compute the entropy too, as the learner always does (a metric); the naive one
does in its second row only, and the ratios are against its first. Time is process CPU time, memory the growth of the
resident set at its peak (VmHWM, reset before each run; CUDA's own peak on a GPU). Medians. `products` is what the
three matrix products take alone: the floor.
Target of the one pass: time <= 0.7x, memory <= 0.1x.
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

from llm_gym.harness.model.heads import token_logprobs, token_loss

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden [M, H], weight [V, H], targets [M], credit [M]) -> sum of credit * log-probability."""


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, credit: Tensor) -> Tensor:
    """Full logits, log-softmax, gather."""
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return (credit * logp.gather(1, targets[:, None])[:, 0]).sum()


def naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, credit: Tensor) -> Tensor:
    """The same, and the entropy as a metric."""
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        (logp.exp() * logp).sum(-1)
    return (credit * logp.gather(1, targets[:, None])[:, 0]).sum()


def two_passes(hidden: Tensor, weight: Tensor, targets: Tensor, credit: Tensor) -> Tensor:
    """What sequence-level losses use."""
    return (credit * token_logprobs(hidden, weight, targets)[0]).sum()


def one_pass(hidden: Tensor, weight: Tensor, targets: Tensor, credit: Tensor) -> Tensor:
    """What token-level losses use."""
    return token_loss(hidden, weight, targets, lambda rows, logprobs, _: credit[rows] * logprobs)


def one_pass_bonus(hidden: Tensor, weight: Tensor, targets: Tensor, credit: Tensor) -> Tensor:
    """With an entropy bonus, whose gradient the others leave out."""
    return token_loss(
        hidden,
        weight,
        targets,
        lambda rows, logprobs, entropy: credit[rows] * (logprobs + 0.01 * entropy),
        entropy_gradient=True,
    )


def products(hidden: Tensor, weight: Tensor) -> float:
    """CPU seconds of the three matrix products, 256 tokens at a time, in memory that is there already."""
    states, weights = hidden.detach()[:256].float(), weight.detach().float()
    logits, back, into = states @ weights.t(), torch.empty_like(states), torch.empty_like(weights)
    started = clock(hidden.device)
    for _ in range(len(hidden) // 256):
        torch.mm(states, weights.t(), out=logits)
        torch.mm(logits, weights, out=back)
        into.addmm_(logits.t(), states)
    return clock(hidden.device) - started


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
    head(hidden, weight, targets, credit).backward()
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
    heads: tuple[Head, ...] = (naive, naive_entropy, two_passes, one_pass, one_pass_bonus)
    results: dict[str, list[tuple[float, int]]] = {head.__name__: [] for head in heads}
    floors: list[float] = []
    for repeat in range(args.repeats + 1):
        for head in heads:
            result = measure(head, hidden, weight, targets, credit)
            if repeat:  # the first round warms up
                results[head.__name__].append(result)
        floors.append(products(hidden, weight))
    size = f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}"
    print(f"{size}, {args.dtype}, {args.device}, {args.threads} threads")
    base_seconds, base_peak = medians(results["naive"])
    for name, runs in results.items():
        seconds, peak = medians(runs)
        print(
            f"{name:14s} {seconds:7.3f} s  {peak / 2**20:7.0f} MB"
            f"   {seconds / base_seconds:.2f}x time  {peak / base_peak:.3f}x memory"
        )
    floor = statistics.median(floors)
    print(f"{'products':14s} {floor:7.3f} s               {floor / base_seconds:.2f}x time")


def medians(runs: list[tuple[float, int]]) -> tuple[float, float]:
    """Median seconds and peak bytes."""
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


if __name__ == "__main__":
    main()
