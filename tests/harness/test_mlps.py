"""The MLP with a backward of its own against transformers' and autograd's."""

import copy

import pytest
import torch
from tiny_models import tiny
from torch import nn

from llm_gym.harness.model import cpu_mlp
from llm_gym.harness.model.cpu_mlp import fuse_mlps


@pytest.fixture
def pair(monkeypatch):
    """A model as transformers made it, and the same with its MLPs changed; three chunks for 20 tokens."""
    monkeypatch.setattr(cpu_mlp, "CHUNK", 8)
    plain = tiny(dtype=torch.float64)
    changed = copy.deepcopy(plain)
    assert fuse_mlps(changed) == 2
    return plain, changed


def loss(model):
    ids = torch.arange(20).view(2, 10) % 7
    return model(input_ids=ids).logits.square().mean()


def test_outputs_and_every_gradient_are_autograds(pair):
    for model in pair:
        loss(model).backward()
    plain, changed = (dict(model.named_parameters()) for model in pair)
    assert loss(pair[0]).item() == pytest.approx(loss(pair[1]).item(), rel=1e-12)
    for name, parameter in plain.items():
        torch.testing.assert_close(changed[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj", "embed_tokens"])
def test_a_frozen_weight_gets_no_gradient_and_the_others_theirs(pair, frozen):
    for model in pair:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        loss(model).backward()
    for (name, want), got in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert (got.grad is None) == (frozen in name)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12)


def test_an_adapter_is_not_passed_by(pair):
    layer = pair[1].model.layers[0].mlp
    before = loss(pair[1]).item()
    layer.up_proj = nn.Sequential(layer.up_proj, nn.Softplus())
    assert loss(pair[1]).item() != pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_another_mlp_is_left_alone(changes):
    assert fuse_mlps(tiny("Llama", **changes)) == 0


def test_autocast_keeps_its_own_way(pair):
    model = pair[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model.layers[0].mlp(torch.ones(1, 3, 32, requires_grad=True))
    assert hidden.dtype == torch.bfloat16


class Clamped(nn.Module):
    """An MLP as GLM, DeepSeek-V4 and Step have it: what it makes inside is cut off, far beyond the numbers of a probe."""

    def __init__(self, limit):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 16, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(16, 8, bias=False)
        self.limit = limit

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("limit", [7.0, 1e6])
def test_a_clamped_mlp_is_left_alone_however_far_its_limit_is(limit):
    layer = Clamped(limit)
    x = torch.randn(3, 8) * 1e8
    want = layer(x)
    assert fuse_mlps(layer) == 0
    assert torch.equal(layer(x.requires_grad_()), want)
    assert fuse_mlps(Clamped(None)) == 1
