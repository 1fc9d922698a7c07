"""The NumPy forward against the model's own."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import contexts, tiny

from llm_gym.core import Sampling
from llm_gym.policies.builtin.forward import feed
from llm_gym.policies.builtin.kv_cache import SlotCache
from llm_gym.policies.builtin.numpy_forward import Lean
from llm_gym.policies.builtin.policy import TransformersPolicy
from llm_gym.policies.builtin.probing import probe

SAMPLING = Sampling(max_tokens=12, stop_token_ids=())


@pytest.fixture(autouse=True)
def one_thread():
    """The step is for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch):
    """How many rows each forward in NumPy fed."""
    seen, call = [], Lean.__call__

    def counted(self, rows, *rest):
        seen.append(len(rows))
        return call(self, rows, *rest)

    monkeypatch.setattr(Lean, "__call__", counted)
    return seen


def decode(served, lean):
    """Logits of three uneven rows after a prefill and two decoding steps."""
    cache = SlotCache(served.layout)
    cache.resize(4, 8)
    rows = slice(0, 3)
    ids = np.arange(12).reshape(3, 4) + 5
    feed(served, cache, rows, ids, np.array([[0, 1, 2, 3], [-1, -1, 0, 1], [-1, 0, 1, 2]]))
    for start in range(2):
        position = np.array([[4], [2], [3]]) + start
        if lean:
            logits = torch.from_numpy(served.lean(np.arange(3), ids[:, start, None], position, cache))
        else:
            cache.aim(rows, position)
            hidden = torch.arange(int(position.max()) + 1) > torch.from_numpy(position)[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=served.layout.dtype).masked_fill(hidden, -torch.inf)
            with torch.no_grad():
                logits = served.forward(torch.from_numpy(ids[:, start, None]), torch.from_numpy(position), mask, cache)
    return logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen3", {}),
        ("Qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("Qwen2", {}),
        ("Llama", {"num_key_value_heads": 1, "attention_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
        ("Mistral", {"sliding_window": None}),
    ],
)
def test_logits_are_the_models(family, changes):
    model = tiny(family, **changes)
    if family == "Qwen2":  # biases start at zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    served, _ = probe(model, None)
    assert served.lean is not None
    want, got = decode(served, lean=False), decode(served, lean=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), queries=st.sampled_from([1, 3, 64]))
def test_any_tokens_of_any_rows_are_fed_as_by_the_model(data, queries):
    served, _ = probe(tiny(dtype=torch.float64), None)
    caches = SlotCache(served.layout), SlotCache(served.layout)
    for cache in caches:
        cache.resize(6, 40)
    filled = np.zeros(6, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_gym.policies.builtin.numpy_forward.QUERIES", queries)
        for _ in range(3):
            rows = np.array(sorted(data.draw(st.sets(st.integers(0, 5), min_size=1))))
            counts = np.array([data.draw(st.sampled_from([1, 1, 2, 5, 9])) for _ in rows])
            columns = np.arange(counts.max()) - counts.max()
            positions = filled[rows, None] + counts[:, None] + columns
            positions[columns < -counts[:, None]] = -1
            ids = np.random.default_rng(len(rows)).integers(0, 97, positions.shape)
            filled[rows] += counts
            got = feed(served, caches[0], rows, ids, positions)
            want = feed(replace(served, lean=None), caches[1], rows, ids, positions)
            torch.testing.assert_close(got, want, rtol=0, atol=3e-5)
    for row, end in enumerate(filled):
        torch.testing.assert_close(*(c.keys[:, row, :, :end] for c in caches), rtol=0, atol=3e-5)
        torch.testing.assert_close(*(c.values[:, row, :, :end] for c in caches), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Cohere", {"logit_scale": 0.5}),
        ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"mlp_bias": True, "dtype": torch.bfloat16}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}),
    ],
)
def test_what_it_does_not_know_is_left_to_the_model(family, changes):
    assert Lean.of(tiny(family, **changes)) is None


def test_a_step_that_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr("llm_gym.policies.builtin.numpy_forward.rotate", lambda x, cosine, sine: x.copy())
    assert probe(tiny(), None)[0].lean is None


def test_completions_are_those_of_the_models_forward(steps):
    model = tiny(dtype=torch.float64)
    policy = TransformersPolicy(model)
    quick = policy.generate(contexts(9), SAMPLING, seeds=range(9))
    assert steps[-1] == 9
    assert len(steps) > 10
    steps.clear()
    with_hook = model.register_forward_hook(lambda *_: None)
    policy.refresh()
    slow = policy.generate(contexts(9), SAMPLING, seeds=range(9))
    with_hook.remove()
    assert not steps, "whoever watches the model sees every forward"
    for a, b in zip(quick, slow, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_newcomer_joins_the_forward_of_those_under_way(steps):
    policy = TransformersPolicy(tiny())
    one, other = contexts(2)
    steps.clear()

    async def both():
        first = asyncio.ensure_future(policy.complete(one, Sampling(max_tokens=6, stop_token_ids=())))
        while len(steps) < 2:
            await asyncio.sleep(0)
        await policy.complete(other, Sampling(max_tokens=3, stop_token_ids=()))
        await first

    asyncio.run(both())
    assert steps == [1, 1, 2, 2, 2, 1]


def test_several_threads_use_the_models_forward(steps, monkeypatch):
    policy = TransformersPolicy(tiny())
    steps.clear()
    # not by set_num_threads: once a vLLM engine ran in this process, vLLM has replaced it by a function of no effect
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    policy.generate(contexts(3), SAMPLING, seeds=range(3))
    assert not steps


@pytest.mark.parametrize("replaced", [False, True])
def test_new_weights_are_read_after_refresh(replaced):
    model, other = tiny(), tiny(seed=1)
    policy = TransformersPolicy(model)
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        if replaced:
            parameter.data = new.detach().clone()
        else:
            parameter.data.copy_(new)
    policy.refresh()
    want = TransformersPolicy(other).generate(contexts(5), SAMPLING, seeds=range(5))
    got = policy.generate(contexts(5), SAMPLING, seeds=range(5))
    assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in want]
