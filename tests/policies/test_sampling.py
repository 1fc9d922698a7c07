"""Sampling: the right distribution, the right log-probability, and streams that depend on nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llm_gym.policies.builtin.sampling import Knobs, draw, uniforms


def knobs(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return Knobs(np.full(n, temperature), np.full(n, top_k, np.int64), np.full(n, top_p), np.full(n, min_p, np.float64))


def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The log-probabilities that transformers' own warpers leave, in float64."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double()) if temperature != 1 else logits.double()
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.log_softmax(-1)


class TestUniforms:
    def test_they_are_the_published_splitmix64_of_a_mixed_seed(self):
        def splitmix(state):  # the reference, in Python integers
            z = state & (2**64 - 1)
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
            z = (z ^ z >> 27) * 0x94D049BB133111EB & (2**64 - 1)
            return z ^ z >> 31

        golden = 0x9E3779B97F4A7C15
        for seed in (0, 7, 2**64 - 1):
            for index in (0, 1, 1000):
                want = (splitmix(splitmix(seed + golden) + (index + 1) * golden) >> 12) / 2**52
                assert uniforms(np.array([seed], np.uint64), np.array([index]))[0] == want

    @pytest.mark.parametrize("along", ["seeds", "indices"])
    def test_they_are_uniform_and_uncorrelated(self, along):
        n = 200_000
        many, one = np.arange(n), np.zeros(n, np.int64)
        seeds, indices = (many, one) if along == "seeds" else (one, many)
        u = uniforms(seeds.astype(np.uint64), indices)
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, 64, (0, 1))[0]
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 6 * np.sqrt(2 * 63)
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(n)


class TestDraw:
    @pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
    def test_a_grid_of_uniforms_visits_every_token_in_proportion(self, settings):
        n = 20_000
        logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(0)) * 2
        tokens, _ = draw(logits.expand(n, -1), knobs(n, **settings), (np.arange(n) + 0.5) / n)
        share = torch.bincount(tokens, minlength=23) / n
        want = warped(logits, **settings).exp()[0]
        assert (share - want).abs().max() <= 1.01 / n
        assert not share[want == 0].any()

    @settings(deadline=None, max_examples=60)
    @given(
        temperature=st.floats(0.2, 3),
        top_k=st.integers(0, 40),
        top_p=st.floats(0.05, 1),
        min_p=st.floats(0, 0.9),
        seed=st.integers(0, 1000),
    )
    def test_log_probabilities_are_those_of_the_filtered_distribution(self, temperature, top_k, top_p, min_p, seed):
        chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        logits = torch.randn(16, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
        tokens, logprobs = draw(logits, knobs(16, **chosen), np.random.default_rng(seed).random(16))
        want = warped(logits, **chosen).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-9)

    def test_float32_log_probabilities_are_good_to_1e_5_at_a_large_vocabulary(self):
        logits = torch.randn(8, 150_000, generator=torch.Generator().manual_seed(0)) * 4
        tokens, logprobs = draw(logits, knobs(8, 0.7), np.random.default_rng(0).random(8))
        want = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert (logprobs.double() - want).abs().max() < 1e-5

    def test_greedy_is_the_argmax_with_its_plain_log_probability(self):
        logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
        tokens, logprobs = draw(logits, knobs(8, 0.0, top_k=3, top_p=0.5), np.full(8, 0.999))
        assert torch.equal(tokens, logits.argmax(-1))
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)

    def test_a_row_is_the_same_in_any_company(self):
        logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        mixed = Knobs(
            np.array([1, 0, 0.5, 1, 2, 1.0]),
            np.array([0, 0, 4, 0, 0, 7]),
            np.array([1, 1, 1, 0.6, 0.9, 1.0]),
            np.array([0, 0, 0, 0, 0.2, 0.0]),
        )
        u = np.random.default_rng(0).random(6)
        tokens, logprobs = draw(logits, mixed, u)
        for i in range(6):
            row = slice(i, i + 1)
            alone = Knobs(mixed.temperature[row], mixed.top_k[row], mixed.top_p[row], mixed.min_p[row])
            token, logprob = draw(logits[row], alone, u[row])
            assert token == tokens[i]
            torch.testing.assert_close(logprob, logprobs[row], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("u", [0.0, 1 - 2.0**-52])
    def test_the_ends_of_the_unit_interval_never_draw_what_was_filtered_out(self, u):
        logits = torch.tensor([[-50.0, 1.0, 3.0, 2.0, -50.0]])
        tokens, logprobs = draw(logits, knobs(1, top_k=3), np.array([u]))
        assert tokens.item() == (1 if u == 0 else 3)
        assert torch.isfinite(logprobs).all()

    def test_broken_logits_show_in_the_log_probability(self):
        _, logprobs = draw(torch.full((2, 9), torch.nan), knobs(2), np.array([0.1, 0.9]))
        assert logprobs.isnan().all()
