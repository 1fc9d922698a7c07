"""A prompt laid out once for its whole group: the same contexts, the same gradient, fewer tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, gradients, llama, qwen3, row

from llm_gym.harness import trees
from llm_gym.harness.batching import MicroBatch, Sample, pack
from llm_gym.harness.learner import Learner
from llm_gym.harness.losses import LossConfig
from llm_gym.harness.merge import parts
from llm_gym.harness.model import Body

GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 15), min_size=1, max_size=5)), min_size=1, max_size=4
)
"""(prompt length, completion lengths) of every group."""


@pytest.fixture(autouse=True, scope="module")
def _share_all() -> Iterator[None]:
    """Whatever is common is shared, however little it saves: rows here are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "LEAST", 1)
        patch.setattr(trees, "BELOW", 0)
        yield


def grouped(groups: list[tuple[int, list[int]]], seed: int = 0) -> list[Sample]:
    """Rows whose prompts are equal within a group, in shuffled order."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt, completions in groups:
        shared = rng.integers(0, VOCABULARY, prompt).astype(np.int32)
        for n in completions:
            r = row(prompt + n, len(made) + 100 * seed, prompt=prompt)
            tokens = np.concatenate([shared, r.tokens[prompt:]])
            made.append(Sample(dataclasses.replace(r, tokens=tokens), float(rng.standard_normal()), len(made)))
    return [made[i] for i in rng.permutation(len(made))]


def contexts(micro: MicroBatch) -> list[tuple[tuple[int, ...], int]]:
    """What each trained token is conditioned on, read from the pieces, and the token."""
    starts = np.cumsum([0, *micro.lengths])
    parents = micro.parents or (-1,) * len(micro.lengths)
    found = []
    for source, target in zip(micro.source.tolist(), micro.target.tolist(), strict=True):
        piece = int(np.searchsorted(starts, source, side="right")) - 1
        context = micro.tokens[starts[piece] : source + 1].tolist()
        while parents[piece] >= 0:
            piece = parents[piece]
            context = micro.tokens[starts[piece] : starts[piece + 1]].tolist() + context
        assert micro.positions[source] == len(context) - 1
        found.append((tuple(context), target))
    return sorted(found)


@given(GROUPS, st.integers(1, 80), st.integers(0, 9))
def test_every_trained_token_keeps_its_context(groups: list[tuple[int, list[int]]], budget: int, seed: int) -> None:
    rows = grouped(groups, seed)
    shared = pack(rows, max_tokens=budget, share=True)
    plain = pack(rows, max_tokens=budget)
    assert sorted(c for m in shared.micro for c in contexts(m)) == sorted(c for m in plain.micro for c in contexts(m))
    assert (shared.tokens, shared.episodes) == (plain.tokens, plain.episodes)
    for m in shared.micro:
        assert len(m.tokens) <= budget or len(set(m.sequence.tolist())) == 1
        parts(m.lengths, m.parents)  # refuses pieces that are not in depth-first order


def test_a_group_of_eight_pays_for_its_prompt_once() -> None:
    (micro,) = pack(grouped([(512, [128] * 8)]), max_tokens=10**6, share=True).micro
    assert len(micro.tokens) == 512 + 8 * 127


@settings(max_examples=15)
@given(GROUPS, st.integers(0, 9), st.sampled_from([25, 60, 10**6]))
def test_the_gradient_is_that_of_plain_rows(groups: list[tuple[int, list[int]]], seed: int, budget: int) -> None:
    model = qwen3(dtype=torch.float64)
    rows = grouped(groups, seed)
    loss = LossConfig(kl="k2", kl_weight=0.1, entropy_weight=0.01)
    plain, shared = (gradient(model, rows, loss, budget=b, share=s) for b, s in ((10**6, False), (budget, True)))
    for name, want in plain.items():
        torch.testing.assert_close(shared[name], want, rtol=1e-9, atol=1e-9 * float(want.abs().max() + 1e-30))


@pytest.mark.parametrize("make", [qwen3, llama])
def test_float32_gradients_agree_too(make) -> None:
    model = make()
    rows = grouped([(9, [4, 7, 12]), (17, [5, 5]), (3, [8])])
    plain, shared = (gradient(model, rows, LossConfig(), budget=10**6, share=s) for s in (False, True))
    for name, want in plain.items():
        assert float((shared[name] - want).norm() / want.norm()) < 1e-5, name


def gradient(model, rows: list[Sample], loss: LossConfig, *, budget: int, share: bool) -> dict[str, torch.Tensor]:
    learner = Learner(model, loss=loss)
    assert learner.body.packed
    for micro in pack(rows, max_tokens=budget, share=share).micro:
        learner._backward(micro, 1.0)
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


def test_siblings_do_not_see_each_other() -> None:
    body = Body(qwen3())
    (micro,) = pack(grouped([(6, [5, 5, 5]), (4, [5])]), max_tokens=10**6, share=True).micro
    start = sum(micro.lengths[:-1])
    changed = dataclasses.replace(micro, tokens=micro.tokens.clone())
    changed.tokens[start:] = (changed.tokens[start:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = body.hidden(micro), body.hidden(changed)
    assert torch.equal(before[:start], after[:start])
    assert not torch.equal(before[start:], after[start:])


def test_a_model_that_cannot_pack_refuses_shared_prompts() -> None:
    body = Body(qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=0))
    assert not body.packed
    (micro,) = pack(grouped([(6, [5, 5])]), max_tokens=10**6, share=True).micro
    with pytest.raises(ValueError, match="share=False"):
        body.hidden(micro)
