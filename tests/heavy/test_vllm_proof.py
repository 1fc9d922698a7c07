"""Faults planted in the way of weights into a real vLLM engine, in float32 and bfloat16: the proof sees and names them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_gym.errors import SyncError
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.weight_sync.sync import Sync

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sync]:
    sets = ["policy.engine=vllm", "policy.vllm.max_model_len=256", f"optimizer.dtype={request.param}"]
    config = load(TrainConfig, sets=sets)
    learner = Learner(load_model(None), config.optimizer)
    sync = Sync(config, learner, folder=tmp_path_factory.mktemp("x"), version=0, tell=print)
    yield sync
    sync.close()


def half(sync: Sync) -> bool:
    """Whether the engine rounds, so that canaries cannot see that a single small tensor is old."""
    return sync.dtype == torch.bfloat16


def move(sync: Sync, seed: int, size: float) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sync.learner.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))


@pytest.fixture
def sync(engine: Sync) -> Iterator[Sync]:
    """The engine up to date, and the learner then a step further."""
    version = engine.policy.version + 1
    engine(version)
    move(engine, version, 0.01)
    yield engine
    found = engine(engine.policy.version + 1)
    assert found["sync/canary_share"] < (0.7 if half(engine) else 0.1), "without the fault all is well again"


def sent_otherwise(sync: Sync, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """From now on `change(tensors, old)` is what reaches the engine; `old` is what it had before."""
    real, old = sync.policy.load, {n: t.clone() for n, t in load_model(None).state_dict().items()}

    def load_changed(tensors: Any, *, version: int) -> None:
        real(change(dict(tensors), old).items(), version=version)

    monkeypatch.setattr(sync.policy, "load", load_changed)


def refused(sync: Sync, monkeypatch: pytest.MonkeyPatch, *, small: bool = False) -> tuple[str, str]:
    """What the whole proof says, and what it says if there are no checksums (not asked if the fault is too small)."""
    said = []
    version = sync.policy.version + 1
    with pytest.raises(SyncError, match=f"'tensors' after step {version}") as error:
        sync(version)
    said.append(str(error.value))
    if small and half(sync):
        monkeypatch.undo()
        return said[0], "disagree by"
    monkeypatch.setattr(sync.policy, "differing", lambda expected: [])
    with pytest.raises(SyncError) as error:
        sync(version)
    said.append(str(error.value))
    monkeypatch.undo()
    return said[0], said[1]


def test_a_forgotten_tensor(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    sent_otherwise(sync, monkeypatch, lambda new, old: {name: t for name, t in new.items() if name != UP})
    named, felt = refused(sync, monkeypatch, small=True)
    assert f"{UP!r} did not arrive" in named
    assert "disagree by" in felt


def test_an_old_tensor(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = "model.norm.weight"
    sent_otherwise(sync, monkeypatch, lambda new, old: new | {norm: old[norm]})
    named, felt = refused(sync, monkeypatch, small=True)
    assert f"{norm!r} did not arrive" in named
    assert "disagree by" in felt


def test_swapped_tensors(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    sent_otherwise(sync, monkeypatch, lambda new, old: new | {UP: new[GATE], GATE: new[UP]})
    named, felt = refused(sync, monkeypatch)
    assert "did not arrive" in named
    assert "(and 1 more)" in named
    assert "disagree by" in felt


def test_a_tied_head_that_stays_behind(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_gym.policies.vllm import worker as vllm_worker

    def stay(worker: Any) -> None:
        stale = worker.model_runner.get_model().lm_head.weight.clone()

        def keep_the_old_one(model: Any) -> None:  # as vLLM's packed copy of a larger head does by itself
            model.lm_head.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, stale, bias)

        monkeypatch.setattr(vllm_worker, "refresh_tied_head", keep_the_old_one)

    sync.policy.thread.call(lambda engine: engine.collective_rpc(stay)).result()
    named, felt = refused(sync, monkeypatch)
    assert "did not arrive" in named
    assert "embed_tokens" in named or "lm_head" in named
    assert "disagree by" in felt


def test_a_prefix_cache_that_is_kept(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor differs: only the canaries can see it."""
    core = sync.policy.thread.engine
    monkeypatch.setattr(core, "reset_prefix_cache", lambda **options: True)
    with pytest.raises(SyncError, match=r"disagree by .* stale"):
        sync(sync.policy.version + 1)
    monkeypatch.undo()


def test_weights_that_were_never_sent(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync.policy, "load", lambda tensors, *, version: setattr(sync.policy, "version", version))
    named, felt = refused(sync, monkeypatch)
    assert "did not arrive" in named
    assert "disagree by" in felt


def test_small_updates_that_are_never_sent(engine: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within the rounding of bfloat16; the canaries alone see them as they add up."""
    version = engine.policy.version + 1
    engine(version)
    monkeypatch.setattr(engine.policy, "load", lambda tensors, *, version: setattr(engine.policy, "version", version))
    monkeypatch.setattr(engine.policy, "differing", lambda expected: [])
    with pytest.raises(SyncError, match=r"disagree by|engine's followed by"):  # noqa: PT012
        for step in range(60):
            move(engine, step, 3e-4)
            engine(version + 1 + step)
    monkeypatch.undo()
    engine(version + 100)


def test_an_adapter_that_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, a hundredth of the weights, and beneath it all is well."""
    sets = ["policy.engine=vllm", "policy.vllm.max_model_len=256", "policy.sync=adapter", "optimizer.dtype=bfloat16"]
    config = load(TrainConfig, sets=sets, lora={"rank": 4})
    learner = Learner(load_model(None, lora=config.lora), config.optimizer)
    sync = Sync(config, learner, folder=tmp_path, version=0, tell=print)
    try:
        noise = torch.Generator().manual_seed(0)
        for version in (1, 2):
            for parameter in learner.model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
            assert sync(2 * version)["sync/canary_share"] < 0.7
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
        ignore = lambda tensors, config, *, version: setattr(sync.policy, "version", version)  # noqa: E731
        monkeypatch.setattr(sync.policy, "load_adapter", ignore)
        with pytest.raises(SyncError, match=r"lora_.*did not arrive"):
            sync(7)
        monkeypatch.setattr(sync.policy, "differing", lambda expected: [])
        with pytest.raises(SyncError, match=r"disagree by|followed by"):
            sync(8)
        monkeypatch.undo()
        assert sync(9)["sync/canary_share"] < 0.7
    finally:
        sync.close()
