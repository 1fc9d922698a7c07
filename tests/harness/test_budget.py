"""The token budget: measured, kept, halved when memory runs out, and never part of the gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from small_models import gradients, qwen3, row, sample, samples
from test_parallel import Told

from llm_gym.errors import ConfigError, ShortOfMemory
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner import memory_probe, token_budget
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.learner.token_budget import Budget, measure, split_to_budget
from llm_gym.harness.types import Batch, MicroBatch

CPU = torch.device("cpu")


def batches() -> dict[str, Batch]:
    """One micro-batch each: plain rows, and two groups that share their prompts."""
    rows = []
    for group in range(2):
        rows += [row(n, 10 * group + i, prompt=8) for i, n in enumerate((20, 12, 25, 9))]
        for other in rows[-3:]:
            other.tokens[:8] = rows[-4].tokens[:8]
    groups = [sample(r, 0.3 * i - 1, i) for i, r in enumerate(rows)]
    return {
        "packed": pack(samples([24, 6, 17, 9, 31]), max_tokens=10**6),
        "shared": pack(groups, max_tokens=10**6, share=True),
    }


def gradient(batch: Batch) -> dict[str, torch.Tensor]:
    model = qwen3(dtype=torch.float64)
    learner = Learner(model)
    for micro in batch.micro:
        learner.backward(micro, 1.0)
    return gradients(model)


@pytest.mark.parametrize("tokens", [1, 20, 40, 70, 10**6])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_split_micro_batches_have_the_same_gradient(layout: str, tokens: int) -> None:
    batch = batches()[layout]
    (whole,) = batch.micro
    assert bool(whole.parents) == (layout == "shared")
    learner = Learner(qwen3(dtype=torch.float64))
    batch = learner.compute_proximal_logprobs(batch)
    parts = split_to_budget(batch, tokens)
    assert (parts.tokens, parts.episodes) == (batch.tokens, batch.episodes)
    assert sum(m.trained for m in parts.micro) == whole.trained
    assert all(len(m.tokens) <= tokens or int(m.streams["sequence"].max()) == 0 for m in parts.micro)
    assert (len(parts.micro) == 1) == (tokens >= len(whole.tokens))
    again = learner.compute_proximal_logprobs(parts)
    for kept, anew in zip(parts.micro, again.micro, strict=True):
        torch.testing.assert_close(kept.streams["proximal"], anew.streams["proximal"], rtol=1e-12, atol=1e-12)
    got, want = gradient(parts), gradient(batch)
    assert max(float(g.abs().max()) for g in want.values()) > 1e-3
    assert all(torch.allclose(got[n], g, rtol=1e-12, atol=1e-12) for n, g in want.items())
    assert split_to_budget(parts, tokens) is parts


def limited(learner: Learner, tokens: int, error: Any) -> list[int]:
    """A machine on which only so many tokens fit; the list of what was tried."""
    tried: list[int] = []
    hidden = learner.backbone.hidden

    def run(micro: MicroBatch) -> torch.Tensor:
        tried.append(len(micro.tokens))
        out = hidden(micro)
        if len(micro.tokens) > tokens:
            error()
        return out

    learner.backbone.hidden = run  # type: ignore[method-assign]
    return tried


def cuda_says_no() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def cpu_says_no() -> None:
    torch.empty(1 << 50)


@pytest.mark.parametrize("error", [cuda_says_no, cpu_says_no])
@pytest.mark.parametrize("share", [False, True])
def test_out_of_memory_halves_the_budget_and_repeats_the_step(error: Any, share: bool) -> None:
    """Gradients of the micro-batches before the failure are not counted again: float64, to 1e-12."""
    settings = OptimizerConfig(lr=1e-3, schedule="linear", max_grad_norm=0.0)
    rows = [*samples([24, 6, 17, 9]), sample(row(90, 5), 0.4, 4), sample(row(88, 6), -0.4, 5)]
    two, one = pack(rows, max_tokens=100, share=share), pack(rows, max_tokens=200, share=share)
    plain = Learner(qwen3(dtype=torch.float64), settings, total_steps=4)
    short = Learner(qwen3(dtype=torch.float64), settings, total_steps=4)
    tried = limited(short, 95, error)
    told: list[str] = []
    kept = Budget(200, short, told.append)
    batch = replace(two, micro=(*two.micro[2:], *one.micro))  # small ones first, then one that is too large
    assert len(batch.micro[0].tokens) < 95 < max(len(m.tokens) for m in batch.micro)
    want, got = plain.step(batch), kept.step(batch, temperature=1.0)
    assert got == pytest.approx(want, rel=1e-9)
    assert (short.step_count, plain.step_count) == (1, 1)
    for a, b in zip(short.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert kept.tokens <= 100
    assert told[-1] == f"memory: ran out; from now on {kept.tokens} tokens a micro-batch, this step once more."
    tried.clear()
    before = len(told)
    kept.step(batch, temperature=1.0)
    assert max(tried) <= 95
    assert len(told) == before


def test_a_row_that_does_not_fit_alone_ends_the_run() -> None:
    learner = Learner(qwen3())
    before = copy.deepcopy(learner.model.state_dict())
    limited(learner, 20, cuda_says_no)
    with pytest.raises(ShortOfMemory, match=r"a row of 29 tokens does not fit alone \(CUDA out of memory\)"):
        Budget(100, learner, lambda _: None).step(pack(samples([30, 8]), max_tokens=100), temperature=1.0)
    assert learner.step_count == 0
    assert all(p.grad is None for p in learner.model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in learner.model.state_dict().items())


def test_other_errors_and_those_of_the_optimizer_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update may be half done: repeating the step would apply it twice."""
    learner = Learner(qwen3())
    monkeypatch.setattr(learner.optimizers[0], "step", cuda_says_no)
    with pytest.raises(torch.OutOfMemoryError):
        Budget(100, learner, lambda _: None).step(pack(samples([30, 8]), max_tokens=100), temperature=1.0)

    def broken() -> None:
        raise RuntimeError("something else")

    limited(learner, 1, broken)
    with pytest.raises(RuntimeError, match="something else"):
        Budget(100, learner, lambda _: None).step(pack(samples([30, 8]), max_tokens=100), temperature=1.0)


# Measuring


def test_growth_is_what_is_allocated() -> None:
    """A block of 96 MiB that is written to, and one of 200 MiB."""
    for size in (96, 200):
        grown = memory_probe.peak(CPU, lambda n=size: torch.ones(n << 18).sum())
        assert grown / 2**20 == pytest.approx(size, rel=0.1)


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    assert 0 < memory_probe.free(CPU) < total
    for file, text in (
        ("memory.max", "1000000\n"),
        ("memory.current", "900000\n"),
        ("memory.stat", "anon 5\ninactive_file 300000\n"),
    ):
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(memory_probe, "CGROUP", tmp_path)
    assert memory_probe.free(CPU) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_probe.free(CPU) > 10**8
    monkeypatch.setattr(memory_probe, "PROC", tmp_path)
    with pytest.raises(memory_probe.Unknown, match="does not say"):
        memory_probe.free(CPU)


def wide() -> Learner:
    return Learner(qwen3(hidden_size=128, intermediate_size=256, num_hidden_layers=4, vocab_size=500))


def test_the_linear_fit_foretells_a_larger_micro_batch() -> None:
    learner = wide()
    before = copy.deepcopy(learner.model.state_dict())
    _, fixed, each = measure(learner)
    larger = token_budget.probe(learner, 8192)
    real = memory_probe.peak(CPU, lambda: token_budget.run(learner, larger))
    state = 8 * sum(p.numel() for p in learner.model.parameters())
    assert fixed >= state
    assert fixed - state + each * 8192 == pytest.approx(real, rel=0.35)
    learner.model.zero_grad()
    assert not any(optimizer.state for optimizer in learner.optimizers)
    assert all(torch.equal(t, before[n]) for n, t in learner.model.state_dict().items())


@pytest.mark.parametrize(
    ("free", "tokens"), [(10**12, token_budget.MOST), (10**6, token_budget.LEAST), (6 * 10**8, None)]
)
def test_the_budget_is_what_fits(free: int, tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_probe, "free", lambda device: free)
    told: list[str] = []
    learner = wide()
    decided = Budget("auto", learner, told.append)
    (line,) = told
    assert f"{free / 2**30:,.1f} GiB free" in line
    assert f"{decided.tokens:,} tokens a micro-batch" in line
    if tokens is not None:
        assert decided.tokens == tokens
    else:
        assert decided.tokens % token_budget.LEAST == 0
        assert token_budget.LEAST < decided.tokens < token_budget.MOST
    assert all(p.grad is None for p in learner.model.parameters())


def test_a_system_that_says_nothing_gets_the_usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_probe, "PROC", tmp_path)
    told: list[str] = []
    assert Budget("auto", wide(), told.append).tokens == token_budget.USUAL
    assert told == ["memory: this system does not say how much memory is free: 16,384 tokens a micro-batch."]


def test_a_probe_that_does_not_fit_gives_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = wide()
    limited(learner, 2000, cuda_says_no)
    told: list[str] = []
    assert Budget("auto", learner, told.append).tokens == token_budget.LEAST
    assert "3,072 tokens do not fit" in told[0]


def test_a_run_decides_once_and_writes_it_down(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_budget: got 0"):
        TrainConfig(token_budget=0)
    fields = {"prompts_per_step": 2, "group_size": 2, "eval": {"episodes": 0}, "sampling": {"max_tokens": 8}}
    config = load(TrainConfig, sets=["token_budget=auto", "steps=1"], **fields)
    trainer = Trainer(config, out=tmp_path)
    trainer.train()
    written = load(TrainConfig, tmp_path / "config.yaml")
    assert written.token_budget == trainer.learning.budget.tokens
    assert isinstance(written.token_budget, int)


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them find half as much each, and what is said is what counts: the least of all."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # an engine that ran in this process may have set it
    monkeypatch.setattr(memory_probe, "free", lambda device: 6 * 10**8)
    monkeypatch.setattr(token_budget, "LEAST", 1)
    monkeypatch.setattr(token_budget, "measure", lambda learner: (memory_probe.free(CPU), 1000.0, 1e5))
    told: list[str] = []
    learner = Learner(qwen3())
    assert Budget("auto", learner, told.append).tokens == 2999
    learner.world = Told(0, 2, lambda value: [value, 1234])
    assert Budget("auto", learner, told.append).tokens == 1234
    learner.world = Told(0, 2, lambda value: [value, value])
    assert Budget("auto", learner, told.append).tokens == 1499
    assert [line.rpartition(": ")[2].split()[0] for line in told] == ["2,999", "1,234", "1,499"]
    assert [" for 2 processes" in line for line in told] == [False, True, True]
