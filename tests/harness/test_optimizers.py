"""Optimizers: each goes on where it stopped, keeps what the table says, and loses no small update."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import qwen3, samples

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner import weights
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OPTIMIZERS, OptimizerConfig, check_optimizer, require

WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Wide enough that matrices have the 4096 elements from which moments are kept in 8 bits."""


def learner(name: str, model: Any = None, loss: LossConfig | None = None, **fields: Any) -> Learner:
    package = OPTIMIZERS[name].package
    if package is not None:
        pytest.importorskip(package)
    settings = OptimizerConfig(name=name, **{"lr": 1e-3, "muon_lr": 1e-3, **fields})
    return Learner(model or qwen3(**WIDE), settings, loss, total_steps=8)


def steps(trained: Learner, numbers: range) -> None:
    for number in numbers:
        trained.step(pack(samples([12, 9, 14, 8], seed=number), max_tokens=30))


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_steps_are_two_saved_and_two_more(name: str, tmp_path: Path) -> None:
    """Bit for bit, through the files of a checkpoint; and forgetting the state would show."""
    whole, half = learner(name), learner(name)
    start = copy.deepcopy(whole.model.state_dict())
    steps(whole, range(4))
    steps(half, range(2))
    weights.save(half, None, tmp_path)
    resumed, forgetful = learner(name), learner(name, copy.deepcopy(half.model))
    weights.restore(resumed, tmp_path)
    assert same(resumed.state_dict(), half.state_dict())
    forgetful.step_count = 2
    steps(resumed, range(2, 4))
    steps(forgetful, range(2, 4))
    after = whole.model.state_dict()
    assert all(not torch.equal(t, start[n]) for n, t in after.items() if t.ndim == 2)
    assert all(torch.equal(t, after[n]) for n, t in resumed.model.state_dict().items())
    assert any(not torch.equal(t, after[n]) for n, t in forgetful.model.state_dict().items())
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name: str) -> None:
    trained = learner(name, lr=3e-3, muon_lr=3e-3, loss=LossConfig(name="sft"))
    batch = pack(samples([12, 9, 14, 8]), max_tokens=100)
    losses = [trained.step(batch)["policy/loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_says_what_is_kept(name: str) -> None:
    """Bytes of state for each element of a 512 x 512 matrix between embedding and head."""
    model = qwen3(num_hidden_layers=1, hidden_size=512, intermediate_size=512, head_dim=128)
    (matrix,) = [p for n, p in model.named_parameters() if n.endswith("up_proj.weight")]
    trained = learner(name, model)
    trained.step(pack(samples([9, 8]), max_tokens=100))
    states = [o.state[matrix] for o in trained.optimizers if matrix in o.state]
    kept = sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 256)
    assert kept / matrix.numel() == pytest.approx(OPTIMIZERS[name].state, rel=0.05, abs=0.01)


def moved(before: dict[str, torch.Tensor], model: Any) -> float:
    """Share of the elements of the layers' matrices that changed."""
    used = [n for n, t in model.state_dict().items() if t.ndim == 2 and "layers" in n]
    changed = sum(int((model.state_dict()[n] != before[n]).sum()) for n in used)
    return changed / sum(before[n].numel() for n in used)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_move_at_a_learning_rate_of_1e_6(dtype: str) -> None:
    """100 steps move > 95% of the weights, whatever is computed in: the weights that are updated are float32."""
    model = qwen3(initializer_range=0.05)
    before = copy.deepcopy(model.state_dict())
    trained = Learner(model, OptimizerConfig(lr=1e-6, dtype=dtype), total_steps=100)
    for step in range(100):
        trained.step(pack(samples([12, 9, 14, 8], seed=step), max_tokens=100))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.dtype for s in trained.optimizers[0].state.values() for t in s.values()} == {torch.float32}
    assert moved(before, model) > 0.95


def test_bfloat16_weights_would_not_move_and_are_refused() -> None:
    model = qwen3(initializer_range=0.05).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"'model.embed_tokens.weight' would be trained in bfloat16.*is lost"):
        Learner(model)
    trained = Learner(model.float(), OptimizerConfig(lr=1e-6), total_steps=100)
    model.to(torch.bfloat16)  # behind its back
    before = copy.deepcopy(model.state_dict())
    for step in range(100):
        trained.step(pack(samples([12, 9, 14, 8], seed=step), max_tokens=100))
    assert moved(before, model) < 0.5


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'adamw8bit' needs bitsandbytes, which is not installed: pip install"):
        check_optimizer(OptimizerConfig(name="adamw8bit"))
    check_optimizer(OptimizerConfig())
    require(None, "nothing")


def test_an_unknown_optimizer_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="did you mean 'adafactor'"):
        OptimizerConfig(name="adafactr")
