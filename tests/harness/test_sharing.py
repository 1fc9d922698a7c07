"""A prompt laid out once for its whole group: the same contexts, the same gradient, fewer tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, gradients, llama, qwen3, row, sample
from transformers import GraniteConfig, GraniteForCausalLM

from llm_gym.core import Completion, Episode, Group, Ids, StopReason, Task, Turn
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.batching import prefix_tree
from llm_gym.harness.batching.packing import pack, samples
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.attention import Form, Layout
from llm_gym.harness.model.checkpointing import wrap_layers
from llm_gym.harness.model.layers import decoder_layers
from llm_gym.harness.model.loading import Backbone, LoraConfig, prepare
from llm_gym.harness.model.prefix_attention import parts
from llm_gym.harness.types import MicroBatch, TrainSequence
from llm_gym.trajectories import trajectories

GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 15), min_size=1, max_size=5)), min_size=1, max_size=4
)
"""(prompt length, completion lengths) of every group."""


@pytest.fixture(autouse=True, scope="module")
def _share_all() -> Iterator[None]:
    """Whatever is common is shared, however little it saves: rows here are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "LEAST", 1)
        patch.setattr(prefix_tree, "BELOW", 0)
        yield


def grouped(groups: list[tuple[int, list[int]]], seed: int = 0) -> list[TrainSequence]:
    """Rows whose prompts are equal within a group, in shuffled order."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt, completions in groups:
        shared = rng.integers(0, VOCABULARY, prompt).astype(np.int32)
        for n in completions:
            r = row(prompt + n, len(made) + 100 * seed, prompt=prompt)
            tokens = np.concatenate([shared, r.tokens[prompt:]])
            made.append(sample(dataclasses.replace(r, tokens=tokens), float(rng.standard_normal()), len(made)))
    return [made[i] for i in rng.permutation(len(made))]


def contexts(micro: MicroBatch) -> list[tuple[tuple[int, ...], int]]:
    """What each trained token is conditioned on, read from the pieces, and the token."""
    starts = np.cumsum([0, *micro.lengths])
    parents = micro.parents or (-1,) * len(micro.lengths)
    found = []
    for source, target in zip(micro.streams["source"].tolist(), micro.streams["target"].tolist(), strict=True):
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
        assert len(m.tokens) <= budget or len(set(m.streams["sequence"].tolist())) == 1
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
    same(shared, plain, 1e-9)


@pytest.mark.parametrize("make", [qwen3, llama])
def test_float32_gradients_agree_too(make) -> None:
    model = make()
    rows = grouped([(9, [4, 7, 12]), (17, [5, 5]), (3, [8])])
    plain, shared = (gradient(model, rows, LossConfig(), budget=10**6, share=s) for s in (False, True))
    for name, want in plain.items():
        assert float((shared[name] - want).norm() / want.norm()) < 1e-5, name


def gradient(
    model: Any,
    rows: list[TrainSequence],
    loss: LossConfig,
    *,
    budget: int,
    share: bool,
    form: Form = "merge",
    **settings: Any,
) -> dict[str, torch.Tensor]:
    learner = Learner(model, OptimizerConfig(**settings), loss)
    assert learner.backbone.packed
    learner.backbone.form = form
    for micro in pack(rows, max_tokens=budget, share=share, normaliser=loss.normaliser).micro:
        learner.backward(micro, 1.0)
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal gradients, relative to each tensor's largest."""
    for name, exact in want.items():
        atol = tolerance * float(exact.abs().max() + 1e-30)
        torch.testing.assert_close(got[name], exact, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_siblings_do_not_see_each_other() -> None:
    body = Backbone(qwen3())
    (micro,) = pack(grouped([(6, [5, 5, 5]), (4, [5])]), max_tokens=10**6, share=True).micro
    start = sum(micro.lengths[:-1])
    changed = dataclasses.replace(micro, tokens=micro.tokens.clone())
    changed.tokens[start:] = (changed.tokens[start:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = body.hidden(micro), body.hidden(changed)
    assert torch.equal(before[:start], after[:start])
    assert not torch.equal(before[start:], after[start:])


def test_a_model_that_cannot_pack_refuses_shared_prompts() -> None:
    body = Backbone(qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=0))
    assert not body.packed
    (micro,) = pack(grouped([(6, [5, 5])]), max_tokens=10**6, share=True).micro
    with pytest.raises(ValueError, match="share=False"):
        body.hidden(micro)


def test_the_form_is_a_matter_of_token_counts() -> None:
    """Copying short beginnings is cheaper than merging; without beginnings there is nothing to copy."""
    assert Layout.of([40, 9, 9], parents=[-1, 0, 0]).merges is False
    assert Layout.of([60, 9, 9], parents=[-1, 0, 0]).merges is True
    assert Layout.of([40, 20, 9, 9, 9], parents=[-1, 0, 1, 1, 1]).merges is True  # 40, 60, 60, 60 before
    assert Layout.of([9, 9]).merges is True
    for form in ("merge", "cat"):
        assert all(Layout.of([n, 9], parents=[-1, 0], form=form).merges is (form == "merge") for n in (2, 200))


# Histories that branch


def rewriting(members: int, turns: int, seed: int = 0, *, rewritten: bool = True) -> Group:
    """Episodes of one task; each turn says 6 tokens, of which the history keeps the last 4 (all, if not rewritten)."""
    rng = np.random.default_rng(seed)

    def new(n: int) -> Ids:
        return rng.integers(0, VOCABULARY, n).astype(np.int32)

    prompt, episodes = new(9), []
    for member in range(members):
        history, played = prompt, []
        for _ in range(turns):
            said = Completion(new(6), -3 + 0.1 * rng.standard_normal(6).astype(np.float32), "stop")
            played.append(Turn(history, said, float(rng.random())))
            history = np.concatenate([history, said.tokens[2 * rewritten :], new(3)])
        episodes.append(Episode("e", seed, trajectories(played), StopReason.ANSWERED, member=member))
    return Group(Task(0, seed), tuple(episodes))


def test_a_history_that_only_grows_is_one_row() -> None:
    """Every turn's tokens are trained in it, and no token is computed twice."""
    made = samples([rewriting(3, 4, rewritten=False)], np.ones((1, 3)))
    assert [len(s.trained) for s in made] == [24, 24, 24]
    (micro,) = pack(made, max_tokens=10**6).micro
    assert micro.lengths == (9 + 3 * 9 + 5,) * 3


def test_a_rewritten_history_is_a_tree() -> None:
    """A row for each turn; the next row goes on where the history was kept: prompt, then kept and new tokens."""
    made = samples([rewriting(3, 4)], np.ones((1, 3)))
    assert len(made) == 12
    (micro,) = pack(made, max_tokens=10**6, share=True).micro
    assert len(micro.tokens) == 9 + 3 * (4 * 5 + 3 * 7)
    depth = {-1: 0}
    for piece, parent in enumerate(micro.parents):
        depth[piece] = depth[parent] + 1
    assert max(depth.values()) == 4


@pytest.mark.parametrize("form", ["merge", "cat"])
@pytest.mark.parametrize("budget", [10**6, 70])
def test_the_gradient_of_a_tree_is_that_of_its_rows(form: Form, budget: int) -> None:
    rng = np.random.default_rng(1)
    groups = [rewriting(3, 4, 1), rewriting(2, 3, 2), rewriting(2, 2, 3, rewritten=False)]
    made = [s for g in groups for s in samples([g], rng.standard_normal((1, len(g.episodes), 4)))]
    model = qwen3(dtype=torch.float64)
    loss = LossConfig(name="gspo", normaliser="sequence", kl="k2", kl_weight=0.1)
    plain = gradient(model, made, loss, budget=1, share=False)
    same(gradient(model, made, loss, budget=budget, share=True, form=form), plain, 1e-9)


# What the attention has to live with


CASES: dict[str, Callable[[], Any]] = {
    "many query heads": lambda: qwen3(dtype=torch.float64, num_attention_heads=6, num_key_value_heads=1),
    "a head of 12": lambda: qwen3(dtype=torch.float64, head_dim=12),
    "a scale": lambda: granite(attention_multiplier=0.4),
    "adapters": lambda: adapted(),
    "checkpoints": lambda: checkpointed(qwen3(dtype=torch.float64)),
    "checkpoints and adapters": lambda: checkpointed(adapted()),
}


def granite(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(vocab_size=VOCABULARY, intermediate_size=48, initializer_range=0.2, **sizes, **fields)
    return prepare(GraniteForCausalLM(config).double())


def adapted() -> Any:
    model = prepare(qwen3(dtype=torch.float64), lora=LoraConfig(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.double()


def checkpointed(model: Any) -> Any:
    """Every decoder layer is run again in the backward pass; attention then reads its layout a second time."""
    wrap_layers(decoder_layers(model), checkpointing=1, offload=False)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["merge", "cat"])
def test_the_gradient_in_other_surroundings(case: str, form: Form) -> None:
    made = samples([rewriting(3, 3)], np.random.default_rng(0).standard_normal((1, 3)))
    made += grouped([(9, [1, 1, 7, 12]), (3, [1, 2])])
    plain = gradient(CASES[case](), made, LossConfig(), budget=10**6, share=False, form="cat")
    same(gradient(CASES[case](), made, LossConfig(), budget=10**6, share=True, form=form), plain, 1e-9)


def test_autocast_to_bfloat16_is_no_worse_than_plain_rows() -> None:
    made = samples([rewriting(3, 4)], np.random.default_rng(0).standard_normal((1, 3)))
    exact = gradient(qwen3(), made, LossConfig(), budget=1, share=False)
    off = {
        share: sum(
            float((g - exact[name]).norm() / exact[name].norm())
            for name, g in gradient(qwen3(), made, LossConfig(), budget=10**6, share=share, dtype="bfloat16").items()
        )
        / len(exact)
        for share in (False, True)
    }
    assert 0 < off[True] < 1.2 * off[False] < 0.2
