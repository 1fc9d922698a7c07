"""What leaves a learner with adapters is what it trains: sent, merged, exported, evaluated, and trained on further."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import contexts, tiny

from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig
from llm_gym.harness.learner import weights
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import Backbone, export, load_model, merged, plain_tensors, prepare
from llm_gym.harness.model.lora import LoraConfig
from llm_gym.harness.runs.export import export_run
from llm_gym.harness.runs.lineage import model_path
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.settings import dump
from llm_gym.harness.weight_sync.sync import Sync
from llm_gym.models.plain import HELD, as_saved, fold
from llm_gym.policies import make_policy

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48}
HEAD, EMBEDDING = ("lm_head", "q_proj"), ("embed_tokens", "q_proj")
BOTH = ("embed_tokens", "lm_head", "q_proj")
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all linear layers": ("Qwen3", {}, {}),
    "the head of a tied model": ("Qwen3", {}, {"target_modules": HEAD}),
    "the embedding of a tied model": ("Qwen3", {}, {"target_modules": EMBEDDING}),
    "both of a tied model": ("Qwen3", {}, {"target_modules": BOTH, "kind": "rslora"}),
    "both of a tied model, DoRA": ("Qwen3", {}, {"target_modules": BOTH, "kind": "dora"}),
    "both, not tied": ("Qwen3", {"tie_word_embeddings": False}, {"target_modules": BOTH}),
    "a head trained whole, tied": ("Qwen3", {}, {"modules_to_save": ("lm_head",)}),
    "an embedding and norms trained whole": (
        "Qwen3", {"tie_word_embeddings": False}, {"modules_to_save": ("embed_tokens", "norm")},
    ),
    "GPT-2": ("GPT2", GPT2, {}),
    "GPT-2, DoRA, its embedding too": ("GPT2", GPT2, {"kind": "dora", "target_modules": ("c_attn", "c_fc", "wte")}),
    "Mixtral, its experts and its router": ("Mixtral", MOE | {"tie_word_embeddings": False}, {}),
    "4 bits": ("Qwen3", {"hidden_size": 64}, {"base": "nf4"}),
    "4 bits, and the embedding of a tied model": ("Qwen3", {"hidden_size": 64}, {"base": "nf4", "target_modules": BOTH}),
    "4 bits, and the head of a tied model": ("Qwen3", {"hidden_size": 64}, {"base": "nf4", "target_modules": HEAD}),
    "4 bits, and the head alone, not tied, DoRA": (
        "Qwen3", {"hidden_size": 64, "tie_word_embeddings": False},
        {"base": "nf4", "kind": "dora", "target_modules": ("lm_head",)},
    ),
    "4 bits, and an embedding that is scaled": (  # no cap of the scores, which `sdpa` leaves out
        "Gemma2", {"hidden_size": 96, "head_dim": 32, "attn_logit_softcapping": None}, {"base": "nf4"},
    ),
    "bfloat16, and the head of a tied model": ("Qwen3", {}, {"base": "bfloat16", "target_modules": HEAD}),
    "bfloat16, DoRA": ("Qwen3", {}, {"base": "bfloat16", "kind": "dora"}),
}  # fmt: skip


def saved(folder: Path, family: str, fields: dict[str, Any]) -> Path:
    """A random model of a family, as a folder."""
    tiny(family, **({"tie_word_embeddings": True} | fields)).save_pretrained(folder)
    return folder


def moved(model: Any) -> Any:
    """The model, its adapters and what is trained beside them changed by as much as matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.2 * parameter.abs() if "magnitude" in name else 0.1))
    return model


IDS = torch.from_numpy(np.stack([np.resize(c, 24) for c in contexts(6)])).long()


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    """Log-probabilities after every token, float64 [6, 24, vocabulary]."""
    found: torch.Tensor = model(input_ids=IDS).logits.double().log_softmax(-1)
    return found


def apart(model: Any, want: torch.Tensor) -> float:
    """The largest difference (nats)."""
    assert not hasattr(model, "peft_config")
    return float((logprobs(model) - want).abs().max())


def trained(folder: Path, kind: str) -> tuple[TrainConfig, Learner]:
    """A learner of that kind, as a run has it, some steps on."""
    family, fields, lora = KINDS[kind]
    if lora.get("base") == "nf4":
        pytest.importorskip("bitsandbytes")
    base = saved(folder / "base", family, fields)
    config = replace(TrainConfig(), model=str(base), lora=LoraConfig(rank=4, **lora))
    config = replace(config, policy=replace(config.policy, sync="copy"))
    return config, Learner(moved(load_model(base, lora=config.lora)))


def checkpoint(config: TrainConfig, learner: Learner, path: Path) -> Path:
    """A run folder with one checkpoint of the learner."""
    run = RunFolder(path)
    run.start(dump(config))
    run.log({"step": 1})
    return run.save(1, lambda folder: weights.save(learner, None, folder), keep=1)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_is_sent_is_exported_is_evaluated(kind: str, tmp_path: Path) -> None:
    """All of them to 1e-4 nats; the learner too, unless bfloat16 is what it computes in."""
    config, learner = trained(tmp_path, kind)
    told: list[str] = []
    sync = Sync(config, learner, folder=tmp_path / "sync", version=0, tell=told.append)
    sent = logprobs(sync.policy.model)
    exact = config.lora is not None and config.lora.base != "bfloat16"  # 4 bits are computed with in float32 on a CPU
    assert float((sent - logprobs(learner.model)).abs().max()) <= (1e-4 if exact else 0.4)
    assert sync(1)["sync/canary_gap_max"] <= (1e-4 if exact else 0.4)
    saved_at = checkpoint(config, learner, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    export(learner.model, tmp_path / "direct")
    plain = transformers.AutoModelForCausalLM.from_pretrained
    evaluated = make_policy(model_path(str(tmp_path / "run")), engine="transformers")
    found = {
        "merged": apart(merged(learner.model), sent),
        "exported": apart(plain(tmp_path / "out", dtype=torch.float32), sent),
        "written for an engine": apart(plain(tmp_path / "direct", dtype=torch.float32), sent),
        "evaluated": apart(evaluated.model, sent),
        "trained on": apart(load_model(saved_at), sent),
    }
    assert max(found.values()) <= 1e-4, found
    tied = (" tied" in kind and "not" not in kind) or "wte" in str(config.lora)
    assert any("two" in line for line in told) == tied
    sync.close()


@pytest.mark.parametrize("kind", ["the head of a tied model", "an embedding and norms trained whole", "4 bits"])
def test_a_checkpoint_is_read_back(kind: str, tmp_path: Path) -> None:
    """And it holds the adapter, not the frozen weights beneath it."""
    config, learner = trained(tmp_path, kind)
    at = checkpoint(config, learner, tmp_path / "run")
    assert not [name for name in weights.read_tensors(at) if "base_layer" in name]
    again = Learner(load_model(tmp_path / "base", lora=config.lora))
    weights.restore(again, at)
    assert torch.equal(logprobs(again.model), logprobs(learner.model))


def test_the_head_that_logits_are_made_of_is_the_one_that_is_sent(tmp_path: Path) -> None:
    four = "4 bits, and the head alone, not tied, DoRA"
    for kind in ("both of a tied model, DoRA", "a head trained whole, tied", "4 bits", four):
        _, learner = trained(tmp_path / kind, kind)
        weight, _ = Backbone(learner.model).head()
        torch.testing.assert_close(weight, dict(plain_tensors(learner.model))["lm_head.weight"], rtol=0, atol=0)


def test_a_merged_model_is_the_learners_no_more(tmp_path: Path) -> None:
    _, learner = trained(tmp_path, "all linear layers")
    plain = merged(learner.model)
    want = logprobs(plain)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(logprobs(plain), want)


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_small_adapter_is_kept_whole(base: str, tmp_path: Path) -> None:
    """An update below half precision's rounding arrives in `merged`, `export` and the tensors, to float32's."""
    folder = saved(tmp_path / "base", "Qwen3", {})
    model = load_model(folder, lora=LoraConfig(rank=4, base=base))
    before = dict(plain_tensors(model, adapters=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-4)
    export(model, tmp_path / "out")
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in plain_tensors(model):
        if name.endswith("q_proj.weight"):
            layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
            update = 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            for found in (tensor, written[name], merged(model).state_dict()[name]):
                torch.testing.assert_close(found - before[name].float(), update, rtol=1e-2, atol=1e-6)


def test_experts_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    """Names and shapes of a merged Mixtral on disk, and of what engines are sent, are those of its base's file."""
    from llm_gym.harness.weight_sync.transports import MODES

    _, learner = trained(tmp_path, "Mixtral, its experts and its router")
    export(learner.model, tmp_path / "out")
    want, got = (weights.read_tensors(tmp_path / name) for name in ("base", "out"))
    assert any("block_sparse_moe.experts.0.w1" in name for name in want)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in want.items()}

    class Engine:
        def load(self, tensors: Any, *, version: int) -> None:
            self.given = dict(tensors)

    engine = Engine()
    MODES["merged"].push(learner.model, engine, 1, tmp_path, lambda tensors: tensors)
    assert engine.given.keys() == got.keys()
    assert all(torch.equal(engine.given[name], tensor) for name, tensor in got.items())


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_sent_has_the_names_of_what_is_saved(tied: bool, tmp_path: Path) -> None:
    """An engine may have no place for a head that is the embedding (vLLM's Gemma 2)."""
    model = tiny("Gemma2", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert dict(as_saved(model, plain_tensors(model))).keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("base", HELD)
def test_an_adapter_on_an_adapter_is_read_back_alone(base: str, tmp_path: Path) -> None:
    """It says which adapter it lies on, and that says the rest."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    below = None
    for number, targets in enumerate((("q_proj",), ("o_proj", "embed_tokens"), ("up_proj",))):
        lora = LoraConfig(rank=4, target_modules=targets, base=base if number else "float32")
        model = load_model(below, lora=lora)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        below = tmp_path / str(number)
        below.mkdir()
        weights.export(model, None, below)
        want, got = merged(model).state_dict(), fold(below).state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_whose_checkpoints_do_not_say_how_the_base_was_held(tmp_path: Path) -> None:
    """Those of older versions: its configuration does."""
    config, learner = trained(tmp_path, "bfloat16, DoRA")
    at = checkpoint(config, learner, tmp_path / "run")
    assert json.loads((at / "base.json").read_text()) == {
        "model": str(tmp_path / "base"),
        "held": "bfloat16",
        "numbers": None,
    }
    (at / "base.json").unlink()
    evaluated = make_policy(at, engine="transformers")
    assert apart(evaluated.model, logprobs(merged(learner.model))) <= 1e-4


def test_an_adapter_that_cannot_be_folded_is_refused_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a layer that peft wraps does something else than a product with its weight."""
    folder = saved(tmp_path / "base", "Qwen3", {})
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x) + x.mean(-1, keepdim=True))
    import peft.tuners.lora.layer as layers

    monkeypatch.setattr(layers.Linear, "forward", lambda self, x, *a, **k: 1.5 * forward(self.base_layer, x))
    with pytest.raises(ConfigError, match=r"the adapter on '.*q_proj' cannot be folded into plain weights"):
        load_model(folder, lora=LoraConfig(target_modules=("q_proj",)))


MAMBA = {"num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4, "use_mambapy": False}
JAMBA = {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_offset": 1, "attn_layer_period": 2}


@pytest.mark.parametrize(
    ("family", "fields", "left_out", "adapted"),
    [
        ("Phimoe", MOE, "router", "q_proj"),  # gives a tuple
        ("Jamba", JAMBA | {"use_mamba_kernels": False}, "dt_proj", "q_proj"),  # its weight is read, not called
        ("Mamba", MAMBA, "out_proj", "in_proj"),  # a kernel reads it on CUDA
    ],
)
def test_all_linear_leaves_out_what_is_more_than_a_product(
    family: str, fields: dict[str, Any], left_out: str, adapted: str
) -> None:
    """There an adapter would not act in training, or fail; and who names such a layer is told so."""
    model = moved(prepare(tiny(family, **fields), lora=LoraConfig(rank=4)))
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert any(adapted in name for name in names)
    assert not any(left_out in name for name in names)
    assert apart(merged(model), logprobs(model)) <= 1e-4
    with pytest.raises(ConfigError, match=rf"lora\.target_modules: got '{left_out}', but the model does more"):
        prepare(tiny(family, **fields), lora=LoraConfig(rank=4, target_modules=(adapted, left_out)))


def test_what_cannot_be_adapted_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: got \['lm_head'\] with lora\.base 'nf4'"):
        LoraConfig(base="nf4", modules_to_save=("lm_head",))
    folder = saved(tmp_path / "base", "Mixtral", MOE)
    with pytest.raises(ConfigError, match=r"lora\.kind: 'dora' does not go into experts that are fused"):
        load_model(folder, lora=LoraConfig(kind="dora"))
