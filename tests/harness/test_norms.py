"""The cheaper norm: equal numbers, equal gradients, only where it is the same norm."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import VOCABULARY, gradients, qwen3
from transformers import Gemma2Config, Gemma2ForCausalLM

from llm_gym.harness.model.cpu_rmsnorm import RMSNorm, fuse_norms


def test_a_model_stays_equal() -> None:
    slow, fast = qwen3(fused=False), qwen3()
    assert fuse_norms(copy.deepcopy(slow)) == 2 * 4 + 1
    ids = torch.randint(0, VOCABULARY, (2, 9))
    outs = [m(input_ids=ids).logits for m in (fast, slow)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    for out in outs:
        out.logsumexp(-1).sum().backward()
    ours, theirs = gradients(fast), gradients(slow)
    assert ours.keys() == theirs.keys() == dict(slow.named_parameters()).keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert fast.state_dict().keys() == slow.state_dict().keys()


def test_with_and_without_a_gradient_is_one_function() -> None:
    model = qwen3()
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        without = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen: bool) -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=not frozen)
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-6), (x, weight))


def test_norms_of_another_form_are_left_alone() -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **heads)
    assert fuse_norms(Gemma2ForCausalLM(config)) == 0


class ClampedRMSNorm(torch.nn.Module):
    """An RMSNorm that cuts off what no probe reaches."""

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.limit = torch.nn.Parameter(torch.ones(8)), 1e-6, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.limit is None else x.clamp(-self.limit, self.limit)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def test_a_clamped_norm_is_left_alone_however_far_its_limit_is() -> None:
    assert fuse_norms(ClampedRMSNorm(1e6)) == 0
    assert fuse_norms(ClampedRMSNorm(None)) == 1
