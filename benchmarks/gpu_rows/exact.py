"""Whether it is right: the device, engine and learner, attention kernels, the loss head, the promise of memory."""

from __future__ import annotations

import platform
from functools import partial
from typing import Any

import head as head_benchmark
import numpy as np
import torch
import transformers
from torch import Tensor

from gpu_rows.models import SHAPES, apart, fields, learner, make, seconds
from gpu_rows.rows import Found, Setting
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner import memory_probe
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.learner.token_budget import SHARE, Budget, measure, probe
from llm_gym.harness.model.attention import Layout, concatenated
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.model.prefix_attention import merged_attention, tried
from llm_gym.harness.types import Batch, TrainSequence
from llm_gym.harness.weight_sync import parity as engine_parity
from llm_gym.policies.builtin.policy import TransformersPolicy

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Part of a device's name -> dense bfloat16 FLOP/s by its maker's data sheet."""


def product_rate(setting: Setting, size: int = 0) -> float:
    """FLOP/s of a plain bfloat16 matrix product here; the best of five."""
    size = size or (256 if setting.small else 8192)
    a, b = (torch.randn(size, size, device=setting.device).bfloat16() for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(setting.device, lambda: torch.mm(a, b)) for _ in range(5))


def device(setting: Setting, found: Found) -> None:
    """Names and versions; memory; the rates that others are shares of."""
    found.add(
        "torch", f"{torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    where = device_of(setting.device)
    if where.type == "cuda":
        card = torch.cuda.get_device_properties(where)
        found.add("card", f"{card.name}, compute capability {card.major}.{card.minor}, CUDA {torch.version.cuda}")
    found.add("free GiB", memory_probe.free(where) / 2**30, least=1)
    a, b = (torch.randn(512, 512, device=where) for _ in range(2))
    exact = a.double() @ b.double()
    found.add("float32 product, error", apart(a @ b, exact), most=1e-5)  # with TF32 it is 1e-4
    found.add("bfloat16 product, error", apart(a.bfloat16() @ b.bfloat16(), exact), most=1e-2)
    out = torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32) if where.type == "cuda" else (a @ b)
    found.add("product into float32, error", apart(out, exact), most=1e-2)
    found.add("bfloat16 TFLOP/s", product_rate(setting) / 1e12)
    block = torch.empty(1 << (20 if setting.small else 30), dtype=torch.uint8, device=where)
    copy = min(seconds(setting.device, block.clone) for _ in range(5))
    found.add("copy GB/s, read and written", 2 * block.numel() / copy / 1e9)


def parity(setting: Setting, found: Found) -> None:
    """The built-in engine against the learner, and the learner here against the learner on the CPU."""
    there, here = (Learner(load_model(None, device=name)) for name in ("cpu", setting.device))
    (batch,) = probe(there, 512, row=64).micro
    gap = here.logprobs(batch)[0].cpu() - there.logprobs(batch)[0]
    found.add("embedded model against the CPU, largest gap", gap.abs().max(), most=1e-4)
    model = make("0.6B", setting)
    engines = {"float32": None, "bfloat16": torch.bfloat16}
    for dtype, autocast in engines.items():
        mine = Learner(model, OptimizerConfig(lr=1e-6, dtype=dtype))
        policy = TransformersPolicy(model, max_context=512, autocast_dtype=autocast)
        gaps = engine_parity.measure(mine, policy, dtype=dtype, tokens=256 if setting.small else 1024)
        policy.close()
        mean, worst = gaps.limits
        found.add(f"{dtype}: mean gap", gaps.mean, most=mean)
        found.add(f"{dtype}: largest gap", gaps.worst, most=worst)


def group(setting: Setting, vocabulary: int) -> Batch:
    """One prompt and eight completions of several lengths, the prompt laid out once."""
    rng, unit = np.random.default_rng(0), 1 if setting.small else 8
    prompt = rng.integers(0, vocabulary, 64 * unit)
    rows = []
    for number, length in enumerate(np.linspace(6, 24, 8).astype(int) * unit):
        tokens = np.concatenate([prompt, rng.integers(0, vocabulary, length)]).astype(np.int32)
        trained = np.arange(len(prompt), len(tokens))
        known = {"old_logprobs": np.full(length, -6.0), "advantages": rng.normal(size=length)}
        rows.append(TrainSequence(tokens, trained, known, number))
    return pack(rows, max_tokens=1 << 62, share=True)


def attention_run(how: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output, and the gradients of all three by a fixed weight."""
    out = how(q, k, v)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, (q, k, v), weight)]


def kernels(setting: Setting, found: Found) -> None:
    """The merge of flash kernels against keys laid out for each sequence, gradients included; alone and in a model."""
    (micro,) = group(setting, fields("0.6B", setting)["vocab_size"]).micro
    layout = Layout.of(micro.lengths, setting.device, micro.parents)
    for shape in SHAPES:
        of = fields(shape, setting)
        heads, groups, size = (of[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{shape} heads, {str(dtype).removeprefix('torch.')}"
            if tried(torch.device(setting.device), dtype, heads, groups, size, size):
                forms(setting, found, name, layout, (heads, groups, groups), size, dtype)
            else:  # no flash kernel has float32 on CUDA
                found.add(f"{name}: form", "cat")
                found.holds(f"{name}: no kernel is expected", dtype == torch.float32 and not setting.small)
    mine = learner("0.6B", setting)
    gradients = []
    for form in ("cat", "merge"):
        mine.backbone.form = form
        mine.model.zero_grad()
        mine.dry_run(micro.to(setting.device))
        gradients.append(torch.cat([p.grad.flatten() for p in mine.model.parameters() if p.grad is not None]))
    found.add("model in bfloat16: gap of all gradients", apart(gradients[1], gradients[0]), most=5e-2)


def forms(
    setting: Setting, found: Found, name: str, layout: Layout, heads: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    """Both forms of attention over a row of that layout, with so many heads of queries, keys and values."""
    shapes = [(1, count, sum(layout.lengths), size) for count in heads]
    given = [torch.randn(shape, device=setting.device, dtype=dtype).requires_grad_() for shape in shapes]
    cat = partial(attention_run, partial(concatenated, layout=layout, scaling=None), *given)
    merge = partial(attention_run, partial(merged_attention, plan=layout.plan, scale=None), *given)
    gap = max(map(apart, merge(), cat()))
    found.add(f"{name}: gap of gradients", gap, most=1e-5 if dtype == torch.float32 else 2e-2)
    slow, quick = (min(seconds(setting.device, way) for _ in range(3)) for way in (cat, merge))
    found.add(f"{name}: cat's time over merge's", slow / quick)


def head(setting: Setting, found: Found) -> None:
    """The loss head at 152k entries against full logits: gradients, time and memory."""
    width, tokens = (64, 1024) if setting.small else (1024, 4096)
    vocabulary = 8192 if setting.small else 151_936
    dtype = torch.float32 if setting.small else torch.bfloat16
    where = torch.device(setting.device)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=where).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=where) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=where)
    credit = torch.randn(tokens, device=where) / tokens
    base: tuple[float, int] | None = None
    wanted: list[Tensor] = []
    for way in (head_benchmark.naive_entropy, head_benchmark.two_passes, head_benchmark.one_pass):
        runs = [head_benchmark.measure(way, hidden, weight, targets, credit) for _ in range(3)]
        taken, peak = min(r[0] for r in runs), min(r[1] for r in runs)
        grads = [x.grad.detach().clone() for x in (hidden, weight)]
        if base is None:
            base, wanted = (taken, peak), grads
            found.add("full logits: ms", 1000 * taken)
            found.add("full logits: MB", peak / 1e6)
            continue
        name = way.__name__.replace("_", " ")
        found.add(f"{name}: gap of gradients", max(map(apart, grads, wanted)), most=1e-5 if setting.small else 2e-2)
        found.add(f"{name}: time over full logits'", taken / base[0])
        found.add(f"{name}: memory over full logits'", peak / base[1], most=1 if setting.small else 0.5)


def planner(setting: Setting, found: Found) -> None:
    """What `token_budget=auto` promises, against what a step takes; and a step of as many tokens as it allows.

    It may take more than was promised by the share of memory that a budget leaves free.
    """
    mine, where = learner("0.6B", setting), torch.device(setting.device)
    mine.step(probe(mine, 1024))  # the optimizer's state is there from now on
    _, fixed, each = measure(mine)
    batch = probe(mine, 8192)
    gradients = sum(4 * p.numel() for p in mine.model.parameters())
    promised = gradients + fixed + each * len(batch.micro[0].tokens)
    peak = memory_probe.peak(where, lambda: mine.step(batch))
    found.add("kB a token", each / 1e3)
    found.add("promised MB of 8,192 tokens", promised / 1e6)
    found.add("taken over promised", peak / promised, least=0.5, most=1 / SHARE[setting.device])
    said: list[str] = []
    budget = Budget("auto", mine, said.append)
    found.add("budget", said[0])
    full = probe(mine, min(budget.tokens, 8192) if setting.small else budget.tokens)
    found.add("step of all of it: s", seconds(setting.device, lambda: budget.step(full, temperature=1.0)))
    found.holds("it fits", len(said) == 1)
