"""The built-in engine against plain forwards of the same model."""

import asyncio
import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, contexts, teacher_forced, tiny, worst_gap

from llm_gym.core import Sampling
from llm_gym.errors import PolicyError, SettingError
from llm_gym.policies.builtin import engine, probing, self_test
from llm_gym.policies.builtin.policy import TransformersPolicy

STOPS = (1, 2, 3)
SAMPLING = Sampling(max_tokens=20, stop_token_ids=STOPS)


WINDOWED = {
    "Mistral": ("Mistral", {"sliding_window": 16}),
    "a window in the mask alone": ("Phimoe", {"sliding_window": 16, "num_local_experts": 4}),
    "Gemma 2": (
        "Gemma2",
        {"sliding_window": 16, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, "num_hidden_layers": 2},
    ),
    "attention sinks": (
        "GptOss",
        {"sliding_window": 16, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
LONG = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 12.0], "factor": 8.0, "rope_theta": 1e4}
BOUNDED = {
    "LongRoPE": (
        "Phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32, **LONG},
            "original_max_position_embeddings": 32,
        },
    ),
    "GPT-Neo": (
        "GPTNeo",
        {"window_size": 32, "attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    ),
}
UNCACHED = {
    "Mamba": {"state_size": 4},
    "Rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "Bloom": {"n_head": 4, "n_layer": 2},
    "Qwen3Next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def next_contexts(before, completions, seed=0):
    """Each context with its completion and something new behind it."""
    new = contexts(len(before), seed, longest=9)
    return [np.concatenate([c, done.tokens, more]) for c, done, more in zip(before, completions, new, strict=True)]


def tokens(completions):
    return [c.tokens.tolist() for c in completions]


@pytest.fixture(scope="module", params=["quick", "modules"])
def forward(request):
    """Which forward serves it: NumPy's, or transformers' modules (as with more threads, or on a GPU)."""
    return request.param


def served_by(forward, model):
    if forward == "modules":
        model.register_forward_hook(lambda *_: None)  # whoever watches the modules gets them
    return model


@pytest.fixture(scope="module")
def model(forward):
    return served_by(forward, tiny())


@pytest.fixture(scope="module")
def exact(forward):
    """A float64 model: rounding cannot tip a draw, so the same draws give the same tokens."""
    return served_by(forward, tiny(dtype=torch.float64))


@pytest.fixture
def fed(model):
    """The shapes of the inputs of every forward."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


class TestLogProbabilities:
    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("Qwen3", {}),
            ("Qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
            ("Qwen2", {}),
            ("Llama", {"num_key_value_heads": 1}),
            ("Mistral", {"sliding_window": None}),
            ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
            ("GPTNeoX", {"num_key_value_heads": 4}),
            ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
            ("Cohere", {"logit_scale": 0.5}),
        ],
    )
    def test_three_uneven_turns_agree_with_plain_forwards(self, family, changes):
        served = tiny(family, **changes)
        policy = TransformersPolicy(served)
        turn, pairs = contexts(14), []
        for seed in range(3):
            done = policy.generate(turn, SAMPLING, seeds=range(14))
            pairs += zip(turn, done, strict=True)
            turn = next_contexts(turn, done, seed)
        assert len({len(c.tokens) for _, c in pairs}) > 5
        assert worst_gap(served, pairs) < 3e-5

    @pytest.mark.parametrize("temperature", [0.6, 1.7])
    def test_the_temperature_is_in_them(self, model, temperature):
        start = contexts(6)
        done = TransformersPolicy(model).generate(start, Sampling(temperature, 20, stop_token_ids=()), seeds=range(6))
        assert worst_gap(model, list(zip(start, done, strict=True)), temperature) < 2e-5

    def test_greedy_reports_temperature_one(self, model):
        start = contexts(6)
        done = TransformersPolicy(model).generate(start, Sampling(0.0, 20, stop_token_ids=()))
        assert worst_gap(model, list(zip(start, done, strict=True))) < 2e-5
        ids = torch.from_numpy(np.concatenate([start[0], done[0].tokens])).long()[None]
        assert torch.equal(model(ids).logits[0, len(start[0]) - 1 : -1].argmax(-1), ids[0, len(start[0]) :])

    def test_the_sampled_frequencies_are_the_models(self, model):
        context, n = contexts(1)[0], 4000
        done = TransformersPolicy(model).generate([context] * n, Sampling(max_tokens=1), seeds=range(n))
        share = np.bincount([c.tokens[0] for c in done], minlength=VOCABULARY) / n
        want = np.exp([teacher_forced(model, context, np.array([i]))[0] for i in range(VOCABULARY)])
        assert (np.abs(share - want) < 5 * np.sqrt(want * (1 - want) / n) + 1 / n).all()

    def test_bfloat16_autocast_stays_near_its_own_plain_forward(self, model):
        start = contexts(6)
        policy = TransformersPolicy(model, autocast_dtype=torch.bfloat16)
        done = policy.generate(start, SAMPLING, seeds=range(6))
        with torch.autocast("cpu", torch.bfloat16):
            gaps = [np.abs(teacher_forced(model, c, d.tokens) - d.logprobs) for c, d in zip(start, done, strict=True)]
        assert np.concatenate(gaps).mean() < 0.1

    def test_a_lora_adapter_is_served(self):
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(
            tiny(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.train()
        start = contexts(6)
        done = TransformersPolicy(adapted).generate(start, SAMPLING, seeds=range(6))
        assert adapted.training
        adapted.eval()
        assert worst_gap(adapted, list(zip(start, done, strict=True))) < 2e-5
        with adapted.disable_adapter():
            assert worst_gap(adapted, list(zip(start, done, strict=True))) > 0.1


class TestBatching:
    def test_company_changes_nothing(self, exact):
        start = contexts(24)
        start[5] = start[6] = start[7]
        want = None
        for options in ({}, {"max_rows": 1}, {"max_rows": 5}, {"cache_bytes": 1}, {"prefill_tokens": 7}):
            policy = TransformersPolicy(exact, **options)
            assert policy.cached
            done = policy.generate(start, SAMPLING, seeds=range(24))
            again = policy.generate(next_contexts(start, done), SAMPLING, seeds=range(24))
            want = want or (done, again)
            assert tokens(done) == tokens(want[0]), options
            assert tokens(again) == tokens(want[1]), options

    @settings(deadline=None, max_examples=60)
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), prefill=st.sampled_from([1, 2, 5, 12, 30, 1000])
    )
    @example(lengths=[1, 5, 3, 9], prefill=1000)  # first and last in place, the middle not
    def test_prefill_in_pieces_of_any_size(self, model, lengths, prefill):
        start = [np.random.default_rng(n).integers(2, VOCABULARY, n).astype(np.int32) for n in lengths]
        policy = TransformersPolicy(model, prefill_tokens=prefill)
        done = policy.generate(start, Sampling(max_tokens=3, stop_token_ids=()), seeds=range(len(start)))
        assert worst_gap(model, list(zip(start, done, strict=True))) < 2e-5

    def test_a_seed_is_a_stream(self, exact):
        policy, context = TransformersPolicy(exact), contexts(1)[0]
        one, other, same = policy.generate([context] * 3, SAMPLING, seeds=[4, 5, 4])
        assert one.tokens.tolist() == same.tokens.tolist() != other.tokens.tolist()
        fresh = [policy.generate([context], SAMPLING)[0].tokens.tolist() for _ in range(4)]
        assert len({tuple(t) for t in fresh}) > 1

    def test_a_group_is_prefilled_once(self, model, fed):
        policy = TransformersPolicy(model)
        fed.clear()
        policy.generate([contexts(1)[0]] * 8, Sampling(max_tokens=3, stop_token_ids=()), seeds=range(8))
        assert fed == [(1, len(contexts(1)[0])), (8, 1), (8, 1)]

    def test_a_turn_feeds_only_what_is_new(self, model, fed):
        policy = TransformersPolicy(model)
        context = np.arange(2, 42, dtype=np.int32)
        done = policy.generate([context], Sampling(max_tokens=5, stop_token_ids=()))[0]
        fed.clear()
        longer = np.concatenate([context, done.tokens, [7, 8, 9]])
        policy.generate([longer], Sampling(max_tokens=1))
        assert fed == [(1, 4)]  # the last sampled token was never fed; three are new

    def test_a_finished_row_costs_nothing_more(self, model, fed):
        policy = TransformersPolicy(model)
        fed.clear()

        async def both():
            short, long = Sampling(max_tokens=2, stop_token_ids=()), Sampling(max_tokens=6, stop_token_ids=())
            a, b = contexts(2)
            await asyncio.gather(policy.complete(a, short), policy.complete(b, long))

        asyncio.run(both())
        assert [rows for rows, _ in fed[1:]] == [2, 1, 1, 1, 1]

    def test_requests_join_while_others_are_under_way(self, exact):
        policy, start = TransformersPolicy(exact), contexts(8)
        sampling = Sampling(max_tokens=12, stop_token_ids=())

        async def one(i):
            for _ in range(3 * i):
                await asyncio.sleep(0)
            return await policy.complete(start[i], sampling, seed=i)

        async def every():
            return await asyncio.gather(*(one(i) for i in range(8)))

        assert tokens(asyncio.run(every())) == tokens(policy.generate(start, sampling, seeds=range(8)))


class TestLimits:
    def test_stop_tokens_end_a_completion_and_stay_in_it(self, model):
        done = TransformersPolicy(model).generate(contexts(40), SAMPLING, seeds=range(40))
        for c in done:
            if c.finish_reason == "stop":
                assert c.tokens[-1] in STOPS
            else:
                assert c.finish_reason == "length"
                assert len(c.tokens) == 20
                assert c.tokens[-1] not in STOPS
            assert not np.isin(c.tokens[:-1], STOPS).any()
        assert {c.finish_reason for c in done} == {"stop", "length"}

    def test_the_models_own_stop_tokens_are_the_default(self):
        served = tiny()
        served.generation_config.eos_token_id = [1, 5]

        class Tokenizer:
            eos_token_id = 9

        policy = TransformersPolicy(served, Tokenizer())
        assert policy.stop_ids == (1, 5, 9)
        done = policy.generate(contexts(60), Sampling(max_tokens=30), seeds=range(60))
        assert {c.tokens[-1] for c in done if c.finish_reason == "stop"} == {1, 5, 9}

    def test_max_tokens_is_trimmed_to_the_context(self, model):
        policy = TransformersPolicy(model, max_context=30)
        full, nearly = np.full(29, 5, np.int32), np.full(25, 5, np.int32)
        done = policy.generate([full, nearly], Sampling(max_tokens=20, stop_token_ids=()))
        assert [(len(c.tokens), c.finish_reason) for c in done] == [(1, "length"), (5, "length")]

    @pytest.mark.parametrize("bad", [np.full(256, 5), np.array([], int), np.array([5, VOCABULARY]), np.array([-1])])
    def test_a_bad_context_fails_alone(self, model, bad):
        policy, good = TransformersPolicy(model), contexts(1)[0]

        async def both():
            return await asyncio.gather(
                policy.complete(bad, SAMPLING), policy.complete(good, SAMPLING, seed=1), return_exceptions=True
            )

        error, done = asyncio.run(both())
        assert isinstance(error, PolicyError)
        assert worst_gap(model, [(good, done)]) < 2e-5

    def test_an_encoder_decoder_is_refused(self):
        from transformers import BartConfig, BartForConditionalGeneration

        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
        with pytest.raises(SettingError, match="encoder-decoder"):
            TransformersPolicy(BartForConditionalGeneration(BartConfig(vocab_size=97, **sizes)))

    def test_a_model_whose_plain_forward_fails_is_refused(self):
        with pytest.raises(SettingError, match="Qwen3NextForCausalLM: a plain forward of a row fails"):
            TransformersPolicy(tiny("Qwen3Next", num_experts=4, num_experts_per_tok=10))

    @pytest.mark.parametrize(("family", "changes"), UNCACHED.items(), ids=list(UNCACHED))
    def test_a_model_that_cannot_be_cached_is_served_without(self, family, changes, caplog):
        served = tiny(family, **changes)
        policy = TransformersPolicy(served, max_rows=5)
        assert not policy.cached
        assert "caches nothing" in caplog.text
        start = [*contexts(6), contexts(6)[2]]
        first = policy.generate(start, Sampling(max_tokens=12, stop_token_ids=()), seeds=range(7))
        turn = next_contexts(start, first)
        second = policy.generate(turn, SAMPLING, seeds=range(7))
        assert worst_gap(served, list(zip(start, first, strict=True))) < 5e-5
        assert worst_gap(served, list(zip(turn, second, strict=True))) < 5e-5

    @pytest.mark.parametrize("name", WINDOWED)
    def test_contexts_beyond_every_window_are_served_beside_short_ones(self, name):
        family, changes = WINDOWED[name]
        served = tiny(family, attn_implementation="eager", **changes)
        policy = TransformersPolicy(served)
        assert policy.max_context == 256
        start = [*contexts(6), np.arange(2, 92, dtype=np.int32)]
        done = policy.generate(start, Sampling(max_tokens=30, stop_token_ids=()), seeds=range(7))
        assert worst_gap(served, list(zip(start, done, strict=True))) < 5e-5

    @pytest.mark.parametrize("name", BOUNDED)
    def test_where_a_cache_cannot_follow_contexts_are_bounded(self, name, caplog):
        family, changes = BOUNDED[name]
        served = tiny(family, attn_implementation="eager", **changes)
        policy = TransformersPolicy(served)
        assert policy.max_context == 32
        assert "up to 32 tokens" in caplog.text
        start = contexts(8, longest=20)
        done = policy.generate(start, Sampling(max_tokens=32, stop_token_ids=()), seeds=range(8))
        assert worst_gap(served, list(zip(start, done, strict=True))) < 5e-5

    def test_beyond_a_window_that_cannot_be_cached_nothing_is(self):
        family, changes = BOUNDED["GPT-Neo"]
        served = tiny(family, attn_implementation="eager", **changes)
        policy = TransformersPolicy(served, max_context=60)
        assert not policy.cached
        start = contexts(8, longest=40)
        done = policy.generate(start, Sampling(max_tokens=60, stop_token_ids=()), seeds=range(8))
        assert worst_gap(served, list(zip(start, done, strict=True))) < 5e-5

    def test_contexts_that_change_the_angles_of_tokens_before_them_are_refused(self):
        family, changes = BOUNDED["LongRoPE"]
        with pytest.raises(SettingError, match="max_context: got 60, but beyond 32 tokens"):
            TransformersPolicy(tiny(family, **changes), max_context=60)

    def test_a_window_as_long_as_the_context_is_served(self):
        served = tiny("Mistral", sliding_window=64)
        policy = TransformersPolicy(served, max_context=64)
        start = contexts(8)
        done = policy.generate(start, Sampling(max_tokens=64, stop_token_ids=()), seeds=range(8))
        assert worst_gap(served, list(zip(start, done, strict=True))) < 2e-5


class TestWeights:
    def test_load_changes_the_output_and_drops_the_cache(self, exact):
        policy, cold = TransformersPolicy(tiny(dtype=torch.float64)), None
        start = contexts(6)
        first = policy.generate(start, SAMPLING, seeds=range(6))
        other = tiny(dtype=torch.float64, seed=1)
        policy.load(other.state_dict().items(), version=3)
        turn = next_contexts(start, first)
        warm = policy.generate(turn, SAMPLING, seeds=range(6))
        cold = TransformersPolicy(other).generate(turn, SAMPLING, seeds=range(6))
        assert tokens(warm) == tokens(cold)
        assert {c.version for c in first} == {0}
        assert {c.version for c in warm} == {3}

    def test_weights_changed_in_place_are_served_after_refresh(self):
        served = tiny()
        policy = TransformersPolicy(served)
        start = contexts(6)
        first = policy.generate(start, SAMPLING, seeds=range(6))
        with torch.no_grad():
            for parameter in served.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        policy.refresh(version=1)
        turn = next_contexts(start, first)
        done = policy.generate(turn, SAMPLING, seeds=range(6))
        assert worst_gap(served, list(zip(turn, done, strict=True))) < 2e-5

    def test_a_tied_head_follows_its_embedding(self):
        policy = TransformersPolicy(tiny())
        other = tiny(seed=1)
        names = [(n, t) for n, t in other.state_dict().items() if n != "lm_head.weight"]
        policy.load(names, version=1)
        start = contexts(4)
        done = policy.generate(start, SAMPLING, seeds=range(4))
        assert worst_gap(other, list(zip(start, done, strict=True))) < 2e-5

    @pytest.mark.parametrize("what", ["missing", "unknown", "shape"])
    def test_load_is_all_or_nothing(self, what):
        served = tiny()
        before = {n: t.clone() for n, t in served.state_dict().items()}
        given = {n: t + 1 for n, t in before.items()}
        if what == "missing":
            given.pop("model.layers.1.mlp.up_proj.weight")
        elif what == "unknown":
            given["model.layers.9.up.weight"] = torch.zeros(1)
        else:
            given["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
        with pytest.raises(PolicyError, match=r"load: .*layers\.[19]"):
            TransformersPolicy(served).load(given.items(), version=1)
        assert all(torch.equal(t, before[n]) for n, t in served.state_dict().items())

    def test_the_learner_is_left_as_it_was(self, model):
        model.train()
        model.model.layers[0].eval()
        before = model.config._attn_implementation
        TransformersPolicy(model).generate(contexts(4), SAMPLING, seeds=range(4))
        assert model.config._attn_implementation == before
        assert model.training
        assert not model.model.layers[0].training
        model(input_ids=torch.arange(5)[None]).logits.sum().backward()
        assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
        model.zero_grad()
        model.eval()

    @pytest.mark.parametrize(("family", "changes"), [("Qwen3", {}), ("Bloom", UNCACHED["Bloom"])])
    def test_a_learner_with_dropout_is_served_where_no_small_copy_can_be_built(self, monkeypatch, family, changes):
        monkeypatch.setattr(self_test, "small_copy", lambda model: None)
        monkeypatch.setattr(probing, "BOUNDS", {})
        served = tiny(family, attention_dropout=0.5, hidden_dropout=0.5, **changes).train()
        policy = TransformersPolicy(served)
        assert served.training
        start = contexts(4)
        done = policy.generate(start, SAMPLING, seeds=range(4))
        assert worst_gap(served.eval(), list(zip(start, done, strict=True))) < 2e-5

    def test_broken_weights_fail_the_request(self):
        served = tiny()
        policy = TransformersPolicy(served)
        with torch.no_grad():
            served.model.norm.weight.fill_(torch.nan)
        with pytest.raises(PolicyError, match="finite"):
            policy.generate(contexts(1), SAMPLING)


class TestLife:
    def test_a_cancelled_request_leaves_the_others_alone(self, exact):
        policy, start = TransformersPolicy(exact), contexts(6)
        want = policy.generate(start, SAMPLING, seeds=range(6))

        async def scenario():
            tasks = [asyncio.ensure_future(policy.complete(c, SAMPLING, seed=i)) for i, c in enumerate(start)]
            for _ in range(6):
                await asyncio.sleep(0)
            for i in (1, 4):
                tasks[i].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        done = asyncio.run(scenario())
        for i in range(6):
            if i in (1, 4):
                assert isinstance(done[i], asyncio.CancelledError)
            else:
                assert done[i].tokens.tolist() == want[i].tokens.tolist()
        policy.refresh()  # nothing is in flight

    def test_a_step_that_breaks_fails_what_was_in_flight_and_nothing_after(self, model):
        policy, start = TransformersPolicy(model), contexts(3)
        calls = []

        def bomb(module, args):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory")

        hook = model.register_forward_pre_hook(bomb)
        with pytest.raises(PolicyError, match="out of memory"):
            policy.generate(start, Sampling(max_tokens=10, stop_token_ids=()))
        done = policy.generate(start, SAMPLING, seeds=range(3))
        hook.remove()
        assert worst_gap(model, list(zip(start, done, strict=True))) < 2e-5

    def test_weights_do_not_change_under_a_request(self, model):
        policy = TransformersPolicy(model)

        async def scenario():
            task = asyncio.ensure_future(policy.complete(contexts(1)[0], SAMPLING, seed=1))
            await asyncio.sleep(0)
            with pytest.raises(PolicyError, match="1 requests are in flight"):
                policy.refresh(version=1)
            await task

        asyncio.run(scenario())
        assert policy.version == 0

    def test_generate_works_where_a_loop_is_running(self, exact):
        policy, start = TransformersPolicy(exact), contexts(3)
        want = tokens(policy.generate(start, SAMPLING, seeds=range(3)))

        async def notebook():
            return policy.generate(start, SAMPLING, seeds=range(3))

        assert tokens(asyncio.run(notebook())) == want

    def test_an_interrupted_loop_leaves_the_engine_usable(self, exact):
        policy, start = TransformersPolicy(exact), contexts(3)

        async def impatient():
            async with asyncio.timeout(0):
                await asyncio.gather(*(policy.complete(c, SAMPLING) for c in start))

        with pytest.raises(TimeoutError):
            asyncio.run(impatient())
        assert len(policy.generate(start, SAMPLING)) == 3

    @pytest.mark.parametrize("kept", [0, 1 << 28])
    def test_what_follows_does_not_depend_on_what_was_cached(self, model, monkeypatch, kept):
        monkeypatch.setattr(engine, "KEPT_BYTES", kept)
        policy = TransformersPolicy(model)
        fresh = TransformersPolicy(model).generate(contexts(2), SAMPLING, seeds=[1, 2])
        for end in (policy.refresh, policy.forget, policy.close):
            policy.generate([np.concatenate(contexts(3)), *contexts(4)], SAMPLING)
            end()
            assert (policy.engine.slots.cache.keys.numel() > 0) == bool(kept)
            again = policy.generate(contexts(2), SAMPLING, seeds=[1, 2])
            for one, two in zip(fresh, again, strict=True):
                assert one.tokens.tolist() == two.tokens.tolist()
                assert one.logprobs.tobytes() == two.logprobs.tobytes()

    def test_a_cache_that_is_not_finite_is_not_kept(self, model):
        policy = TransformersPolicy(copy.deepcopy(model))
        policy.generate(contexts(2), SAMPLING)
        weight = policy.model.get_output_embeddings().weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
        policy.refresh()
        with pytest.raises(PolicyError, match="not finite"):
            policy.generate(contexts(2), SAMPLING)
        with torch.no_grad():
            weight.copy_(before)
        policy.refresh()
        assert policy.engine.slots.cache.keys.numel() == 0
        assert len(policy.generate(contexts(2), SAMPLING)) == 2
