"""Learning rates that nobody set: by size, adapters, optimizer, and the run that made the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llm_gym import embedded
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.learner.optimizers import OPTIMIZERS
from llm_gym.harness.loops.sft import SFTConfig
from llm_gym.harness.model.lora import KINDS, LoraConfig
from llm_gym.harness.rates import ADAPTERS, FULL, by_size, hidden_size, muon_rate
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.settings import dump

LARGE = (896, 1024, 1536, 2048, 4096, 8192)
"""Hidden sizes from 0.5B to 70B."""


def folder(path: Path, model_type: str = "qwen3", **fields: Any) -> str:
    """A model's config without its weights."""
    AutoConfig.for_model(model_type, **fields).save_pretrained(str(path))
    return str(path)


def lr(*sets: str, model: str | None = None) -> float:
    found = load(TrainConfig, model=model, sets=sets).resolved().optimizer.lr
    assert found is not None
    return found


def test_large_models_keep_the_field_s_careful_values() -> None:
    for width in LARGE:
        assert [by_size(loop, width)[0] for loop in ("train", "distill", "sft")] == [1e-6, 1e-6, 1e-5]
        assert [by_size(loop, width, LoraConfig())[0] for loop in ("train", "sft")] == [1e-5, 1e-4]


@pytest.mark.parametrize("loop", FULL)
def test_the_wider_the_more_careful(loop: str) -> None:
    found = [by_size(loop, width)[0] for width in range(16, 9000, 16)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (FULL[loop][0][1], FULL[loop][-1][1])
    for width, rate in FULL[loop]:
        assert by_size(loop, width)[0] == rate


def test_adapters_move_what_they_stand_for_alike_at_every_scale() -> None:
    """rslora's output is scaled by alpha / sqrt(rank) where the others' is by alpha / rank."""
    for rank in (4, 16, 64):
        found = {kind: by_size("train", 128, LoraConfig(kind=kind, rank=rank))[0] for kind in KINDS}
        assert found["lora"] == found["dora"] == pytest.approx(ADAPTERS * 2e-4)
        assert found["rslora"] / rank**0.5 == pytest.approx(found["lora"] / rank, rel=0.02)


def test_a_folder_trains_at_the_rate_of_its_size(tmp_path: Path) -> None:
    """Not at that of a large model because it is a folder; no weight is looked at."""
    assert lr(model=folder(tmp_path / "small", hidden_size=128)) == lr() == 2e-4
    assert lr(model=str(embedded.PATH)) == 2e-4
    assert lr(model=folder(tmp_path / "large", hidden_size=1024)) == 1e-6
    assert lr("lora.rank=8", model=str(tmp_path / "large")) == 1e-5
    assert lr("lora.rank=8") == 2e-3
    assert 1e-6 < lr(model=folder(tmp_path / "between", hidden_size=384)) < 2e-4
    assert hidden_size(folder(tmp_path / "gpt2", "gpt2", n_embd=256)) == 256
    below = str(tmp_path / "small")
    for name in ("first", "second"):  # an adapter, and one on it
        (tmp_path / name).mkdir()
        text = json.dumps({"base_model_name_or_path": below})
        below = str(tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(text, "utf-8")
        assert hidden_size(below) == 128
    assert lr("optimizer.lr=0.5", model=str(tmp_path / "large")) == 0.5
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "small")}))
    assert lr(model=str(tmp_path)) == 2e-4, "that of the model under the adapter"
    (tmp_path / "adapter_config.json").unlink()
    assert lr(model=str(tmp_path)) == 1e-6, "what is no model is refused where it is loaded"


@pytest.mark.parametrize("shape", [(128, 128), (384, 128), (128, 384)])
def test_muon_moves_its_matrices_as_far_as_adamw_would(shape: tuple[int, int]) -> None:
    generator, weight = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.zeros(shape))
    muon = torch.optim.Muon([weight], lr=muon_rate(2e-4, 128), weight_decay=0.0)
    weight.grad = torch.randn(shape, generator=generator)
    muon.step()
    moved = float(weight.detach().square().mean().sqrt())
    assert 0.2 * 2e-4 < moved < 0.6 * 2e-4


def test_muon_s_rate_follows_the_rate() -> None:
    def rates(*sets: str) -> Any:
        return load(TrainConfig, sets=["optimizer.name=muon", *sets]).resolved().optimizer

    assert (rates().lr, rates().muon_lr) == (2e-4, muon_rate(2e-4, 128))
    assert rates("optimizer.lr=1e-4").muon_lr == muon_rate(1e-4, 128)
    assert rates("optimizer.muon_lr=0.5").muon_lr == 0.5
    assert load(TrainConfig).resolved().optimizer.muon_lr is None


def made(path: Path, config: Any) -> str:
    """The folder of a run that is complete, as far as its rate is concerned."""
    run = RunFolder(path)
    run.start(dump(config))
    run.log({"step": 1})
    run.save(1, lambda checkpoint: folder(checkpoint, hidden_size=128), keep=1)
    return str(path)


def test_a_run_passes_its_rate_on_to_its_like(tmp_path: Path) -> None:
    run = made(tmp_path / "run", load(TrainConfig, sets=["optimizer.lr=3e-4"]))
    assert lr(model=run) == lr(model=f"{run}/checkpoints/step_000001") == 3e-4
    assert lr("optimizer.lr=1e-3", model=run) == 1e-3
    assert lr("lora.rank=8", model=run) == 2e-3, "all weights were trained, not adapters"
    for name in OPTIMIZERS:
        assert lr(f"optimizer.name={name}", model=run) == (3e-4 if name == "adamw" else 2e-4)
    assert SFTConfig(model=run).resolved().optimizer.lr == 5e-4, "another loop"
    told = load(TrainConfig, model=run)
    assert told.rates.words(told.optimizer) == f"learning rate 0.0003 (as {run} was trained)"


def test_what_sft_has_made_trains_at_the_rate_of_its_size(tmp_path: Path) -> None:
    RunFolder(tmp_path / "sft").start(dump(SFTConfig(dataset="x", model=str(embedded.PATH)).resolved()))
    folder(tmp_path / "sft/model", hidden_size=128)
    assert lr(model=str(tmp_path / "sft")) == lr(model=str(tmp_path / "sft/model")) == 2e-4


def test_the_choice_is_written_as_numbers_and_explained() -> None:
    config = load(TrainConfig, sets=["optimizer.name=muon"])
    settled = config.resolved()
    assert load(TrainConfig, sets=[], **{"optimizer": vars_of(dump(settled))}).optimizer == settled.optimizer
    words = "learning rate 0.0002, 0.00091 for Muon's matrices (all weights, hidden size 128)"
    assert config.rates.words(config.optimizer) == settled.rates.words(settled.optimizer) == words
    other = load(TrainConfig, sets=["optimizer.lr=0.01"])
    assert other.rates.words(other.optimizer) == "learning rate 0.01 (as set)"


def vars_of(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)["optimizer"]
