"""Rounding of weights and of arithmetic, as a coarser type would do it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny

from llm_gym.harness.model.rounding import held_as, rounding, unit

IDS = torch.arange(2, 42)[None] % VOCABULARY


@torch.no_grad()
def hidden(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.get_decoder()(input_ids=IDS).last_hidden_state
    return out


def test_unit_round_off() -> None:
    assert unit(torch.bfloat16) == 2**-8
    assert unit(torch.float16) == 2**-11
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.linspace(1, 2, 4097, dtype=torch.float64)
        assert ((x.to(dtype).double() - x) / x).abs().max() == pytest.approx(unit(dtype), rel=0.01)


@pytest.mark.parametrize("family", ["Qwen3", "GPTNeoX", "OPT"])
def test_weights_are_held_as_a_rounded_copy_holds_them_and_put_back(family: str) -> None:
    more = {"word_embed_proj_dim": 16, "ffn_dim": 64} if family == "OPT" else {}
    model = tiny(family, **more)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = hidden(model)
    rounded = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    for name, buffer in model.named_buffers():  # rotary frequencies are no weights
        rounded.get_buffer(name).copy_(buffer)
    with held_as(model, torch.bfloat16):
        torch.testing.assert_close(hidden(model), hidden(rounded), rtol=0, atol=0)
    assert not torch.equal(exact, hidden(rounded))
    assert torch.equal(exact, hidden(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_are_put_back_after_a_forward_that_fails() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    hook = model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError), held_as(model, torch.bfloat16):
        hidden(model)
    hook.remove()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_rounding_does_grows_with_its_size_and_can_be_repeated() -> None:
    model = tiny()
    exact, moved = hidden(model), []
    for size in (0.0, 1e-5, 1e-4):
        with rounding(model, size, 0):
            moved.append((hidden(model) - exact).abs().mean())
            with rounding(model, 0.0, 1):
                pass
    assert moved[0] == 0
    assert float(moved[2] / moved[1]) == pytest.approx(10, rel=0.05), "to first order"
    for seed, same in ((0, True), (1, False)):
        with rounding(model, 1e-4, seed):
            assert bool((hidden(model) - exact).abs().mean() == moved[2]) == same
    assert torch.equal(hidden(model), exact)
