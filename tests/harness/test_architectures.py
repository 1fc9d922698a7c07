"""A dozen architectures, one for each way that a model is handled and each that once gave wrong numbers.

`benchmarks/models.py` measures all of them; docs/models.md holds what it found.
"""

from __future__ import annotations

from functools import partial

import pytest
from agreement import Measured, engine, gradient, guarded, learner, lora
from architectures import BY_NAME, VARIANTS

CASES = {
    # variant: (whether the learner packs rows of any length, whether the engine serves contexts of any length)
    "Qwen3, tied head": (True, True),
    "Llama, dynamic NTK rope": (False, False),
    "HunYuan, dynamic NTK rope": (False, True),
    "Phi-3/4, LongRoPE": (False, False),
    "PhiMoE, window": (False, True),
    "Mistral, window": (False, True),
    "Gemma 2": (False, True),
    "NanoChat": (True, True),
    "GPT-Neo": (False, False),
    "Falcon, ALiBi": (False, False),
    "Step-3.7, a large channel": (False, True),
    "ModernBERT decoder": (False, True),
    "DeepSeek-V3": (True, True),
}


def check(found: Measured, free: bool) -> None:
    """Right, and not restricted where it need not be; nothing is refused."""
    assert not found.wrong, found
    assert not found.refused, found
    assert not free or not found.restricted, found


@pytest.mark.parametrize("name", CASES)
def test_the_learners_log_probabilities_are_those_of_each_row_alone(name: str) -> None:
    check(learner(BY_NAME[name]), CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_the_engine_reports_what_a_plain_forward_gives(name: str) -> None:
    check(guarded(partial(engine, BY_NAME[name])), CASES[name][1])


@pytest.mark.parametrize("name", ["Phi-3/4, LongRoPE", "Gemma 2", "Step-3.7, a large channel"])
def test_the_gradient_is_that_of_each_row_alone(name: str) -> None:
    check(gradient(BY_NAME[name]), free=False)


@pytest.mark.parametrize("name", ["Qwen3, tied head", "Gemma 2"])
def test_an_exported_adapter_is_the_trained_one(name: str) -> None:
    check(lora(BY_NAME[name]), free=False)


def test_every_variant_is_named_once() -> None:
    assert len(BY_NAME) == len(VARIANTS) >= 90
