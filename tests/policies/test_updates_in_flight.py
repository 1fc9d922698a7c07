"""Weights that change under requests of the built-in engine: every token is of the version that it says."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import contexts, teacher_forced, tiny

from llm_gym.concurrency import Loop
from llm_gym.core import Completion, Sampling
from llm_gym.policies.builtin.engine import Engine
from llm_gym.policies.builtin.policy import TransformersPolicy

LONG = Sampling(max_tokens=24, stop_token_ids=())
MODELS = [("Llama", {}), ("Qwen3", {}), ("Mistral", {"sliding_window": 16}), ("Mamba", {"state_size": 4})]


def weights(model: Any, seed: int) -> list[tuple[str, torch.Tensor]]:
    """The model's weights, each moved by a tenth of its size."""
    generator = torch.Generator().manual_seed(seed)
    moved = ((name, p.detach()) for name, p in model.named_parameters())
    return [(name, p + 0.1 * p.std() * torch.randn(p.shape, generator=generator)) for name, p in moved]


def gap_of_spans(model: Any, versions: list[list[tuple[str, torch.Tensor]]], pairs: list[Any]) -> float:
    """The greatest difference (nats) of a token from the model of the version that it says."""
    worst = 0.0
    for version, tensors in enumerate(versions):
        with torch.no_grad():
            for name, tensor in tensors:
                dict(model.named_parameters())[name].copy_(tensor)
        for context, done in pairs:
            own = np.flatnonzero(done.versions == version)
            if len(own):
                want = teacher_forced(model, context, done.tokens)
                worst = max(worst, float(np.abs(done.logprobs[own] - want[own]).max()))
    return worst


async def updated(policy: TransformersPolicy, versions: list[Any], start: list[Any]) -> list[Completion]:
    """Completions during which every version but the first arrives; some begin later, one is cancelled."""
    tasks = [asyncio.ensure_future(policy.complete(c, LONG, seed=i)) for i, c in enumerate(start)]
    for version in range(1, len(versions)):
        for _ in range(7):
            await asyncio.sleep(0)
        if version == 1:
            tasks[0].cancel()
        policy.load(versions[version], version=version)
        tasks += [asyncio.ensure_future(policy.complete(start[0], LONG, seed=90 + version))]
    done = await asyncio.gather(*tasks[1:])
    return list(done)


def played(model: Any) -> tuple[list[Any], list[Completion], list[Any]]:
    """Three versions of a model, completions through all of them, and these beside their contexts."""
    versions = [weights(model, seed) for seed in range(3)]
    policy = TransformersPolicy(model)
    policy.load(versions[0], version=0)
    start = contexts(6)
    done = asyncio.run(updated(policy, versions, start))
    return versions, done, list(zip([*start[1:], start[0], start[0]], done, strict=True))


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_each_span_of_a_completion_matches_its_own_version(family: str, changes: dict[str, Any]) -> None:
    model = tiny(family, **changes)
    versions, done, pairs = played(model)
    assert sum(len(set(one.versions.tolist())) == 3 for one in done) >= 4
    assert {len(one.tokens) for one in done} == {24}
    assert gap_of_spans(model, versions, pairs) < 1e-4


def test_kept_keys_and_values_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "refill", lambda self: None)
    model = tiny("Llama")
    versions, _, pairs = played(model)
    assert gap_of_spans(model, versions, pairs) > 1e-3


def test_rows_longer_than_a_prefill_are_computed_again_in_pieces() -> None:
    model = tiny("Llama")
    versions = [weights(model, seed) for seed in range(2)]
    policy = TransformersPolicy(model, prefill_tokens=8)
    policy.load(versions[0], version=0)
    start = contexts(4)
    done = asyncio.run(updated(policy, versions, start))
    assert gap_of_spans(model, versions, list(zip([*start[1:], start[0]], done, strict=True))) < 1e-4


def test_a_policy_that_lives_in_one_loop_answers_in_all_and_takes_weights_from_any_thread() -> None:
    model = tiny("Llama")
    versions = [weights(model, seed) for seed in range(2)]
    policy, home, start = TransformersPolicy(model), Loop("test"), contexts(4)
    policy.load(versions[0], version=0)
    policy.serve_in(home)
    under_way = [home.submit(policy.complete(c, LONG, seed=i)) for i, c in enumerate(start)]
    policy.load(versions[1], version=1)  # whenever it comes, between two steps
    now = policy.generate(start, LONG, seeds=range(4))
    done = [future.result() for future in under_way]
    home.stop()
    policy.close()
    assert {int(v) for one in now for v in one.versions} == {1}
    assert gap_of_spans(model, versions, list(zip(start * 2, [*done, *now], strict=True))) < 1e-4


def test_while_it_is_paused_no_token_is_drawn() -> None:
    policy, home = TransformersPolicy(tiny("Llama")), Loop("test")
    policy.serve_in(home)
    with policy.paused():
        future = home.submit(policy.complete(contexts(1)[0], LONG, seed=0))
        assert not future.done()
    assert len(future.result(60).tokens) == 24
    home.stop()
    policy.close()


def test_no_deadline_of_a_loop_comes_nearer_while_it_waits_for_a_lock() -> None:
    home, lock, waiting = Loop("test"), threading.Lock(), threading.Event()

    async def wait() -> tuple[float, float]:
        clock = asyncio.get_running_loop().time
        began, real = clock(), time.monotonic()
        waiting.set()
        with home.waiting_for(lock):
            return clock() - began, time.monotonic() - real

    with lock:
        future = home.submit(wait())
        assert waiting.wait(60)
        threading.Event().wait(0.3)
    seen, real = future.result(60)
    home.stop()
    assert real - seen > 0.05
