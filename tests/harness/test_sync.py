"""Weights reach the sampler, and the proof sees it when they do not: modes, canaries, planted faults."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_gym.errors import ConfigError, SyncError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.loading import LoraConfig, adapter_tensors, load_model, merged, plain_tensors
from llm_gym.harness.weight_sync.engines import RECEIVERS, engine_of, engine_options
from llm_gym.harness.weight_sync.transports import MODES, Mode, Seen, modes_of
from llm_gym.harness.weight_sync.verify import ProbePrompts, WeightSyncCheck
from llm_gym.policies.builtin.policy import TransformersPolicy


def learner(seed: int | None = None, *, std: float = 0.02) -> Learner:
    """The embedded model, moved a little if a seed is given."""
    made = Learner(load_model(None))
    if seed is not None:
        moved(made, seed, std)
    return made


def copied(of: Learner, dtype: torch.dtype = torch.float32) -> TransformersPolicy:
    """An engine of its own with the weights as they are."""
    return TransformersPolicy(copy.deepcopy(of.model).to(dtype))


def proof_of(
    of: Learner, policy: Any, *, half: bool = False, limit: float | None = None, **how: Any
) -> WeightSyncCheck:
    """The proof of an engine that computes in float32, or of one that holds and computes everything in bfloat16."""
    canaries = ProbePrompts.of(of.backbone.config.vocab_size, policy.max_context, 1.0, exact=not half)
    how = ({"coarse": torch.bfloat16, "held": torch.bfloat16} if half else {}) | how
    return WeightSyncCheck(of, policy, canaries, limit=limit, **how)


def moved(of: Learner, seed: int, std: float) -> None:
    """Noise on every weight, as if trained."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in of.model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=noise))


def test_what_arrived_is_proven() -> None:
    start, later = learner(), learner(seed=1)
    policy = copied(start)
    assert proof_of(start, policy)({}, version=0, how="start").worst < 1e-5
    policy.load(plain_tensors(later.model), version=3)
    assert proof_of(later, policy)({}, version=3, how="sync").worst < 1e-5


def test_nothing_sent_is_seen() -> None:
    policy = copied(learner())
    with pytest.raises(SyncError, match=r"step 4: engine and learner disagree by .* nats"):
        proof_of(learner(seed=1), policy)({}, version=0, how="sync after step 4")


@pytest.mark.parametrize("stale", ["model.embed_tokens.weight", "model.norm.weight", "self_attn.q_norm", "up_proj"])
def test_one_forgotten_tensor_is_seen_by_the_canaries_alone(stale: str) -> None:
    later = learner(seed=1)
    policy = copied(learner())
    old = dict(policy.model.state_dict())
    tensors = {
        n: old[n].clone() if stale in n or (n, stale) == ("lm_head.weight", "model.embed_tokens.weight") else t
        for n, t in plain_tensors(later.model)
    }
    policy.load(tensors.items(), version=1)
    with pytest.raises(SyncError, match="disagree"):
        proof_of(later, policy)({}, version=1, how="sync")


def test_a_stale_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = learner()
    policy = TransformersPolicy(moved.model)
    check = proof_of(moved, policy)
    check({}, version=0, how="start")
    with torch.no_grad():
        for name, parameter in moved.model.named_parameters():
            if "k_proj" in name or "v_proj" in name:
                parameter.mul_(1.2)
    policy.version = 1  # and no refresh: the rows of the last canaries are still cached
    with pytest.raises(SyncError, match="stale cache"):
        check({}, version=1, how="sync")
    policy.refresh(version=1)
    check({}, version=1, how="sync")


def test_a_wrong_version_is_seen() -> None:
    start = learner()
    with pytest.raises(SyncError, match="samples with version 0 of the weights, not 5"):
        proof_of(start, copied(start))({}, version=5, how="sync")


def test_tensors_that_differ_are_named() -> None:
    start = learner()
    policy = copied(start)
    policy.differing = lambda expected: ["b", "c"]  # type: ignore[attr-defined]
    with pytest.raises(SyncError, match=r"'b' \(and 1 more\) did not arrive"):
        proof_of(start, policy)({"a": 1, "b": 2, "c": 3}, version=0, how="sync")


def test_a_learner_in_bfloat16_does_not_blur_an_engine_in_float32() -> None:
    """Nothing is sent and the engine rounds nothing: it is held to what the learner's weights give in float32."""
    start = Learner(load_model(None), OptimizerConfig(dtype="bfloat16"))
    policy = TransformersPolicy(start.model)
    check = proof_of(start, policy)
    apart = []
    for seed in range(4):
        policy.refresh(version=seed)
        assert check({}, version=seed, how="sync").worst < 1e-5
        batch = check.canaries.batch(check.canaries.complete(policy))
        apart.append(float((start.logprobs(batch, entropy=False)[0] - batch.streams["old_logprobs"]).abs().max()))
        moved(start, seed, 0.05)
    assert max(apart) > 0.01, "though what the learner trains with is off by that much"
    with pytest.raises(SyncError, match="stale cache"):
        check({}, version=3, how="sync")  # without a refresh


def test_an_engine_in_bfloat16_is_judged_by_the_learners_own_rounding() -> None:
    """However far training has moved the model; the module's text has the numbers of real runs."""
    now = learner()
    policy = copied(now, torch.bfloat16)
    check = proof_of(now, policy, half=True)
    shares = []
    for version, std in enumerate([0.0, *[1e-4] * 3, *[1e-3] * 3, *[0.02] * 3]):
        moved(now, version, std)
        policy.load(plain_tensors(now.model), version=version)
        found = check({}, version=version, how="sync")
        shares.append(found.share)
    assert 0.02 < min(shares) < max(shares) < 0.7
    with pytest.raises(SyncError, match="more than 0.001"):
        proof_of(now, policy)({}, version=9, how="start")  # said to be exact, and is not
    assert proof_of(now, policy, limit=3.0)({}, version=9, how="start").share < 1
    with pytest.raises(SyncError, match="on the average token"):
        proof_of(learner(), policy, half=True)({}, version=9, how="sync")


@pytest.mark.parametrize("forgotten", ["", "mlp"])
def test_small_updates_that_do_not_arrive_are_seen_as_soon_as_rounding_does_not_hide_them(forgotten: str) -> None:
    """All of an update, or a part: the gap alone says nothing yet, but the engine does not move as the learner does."""
    now = learner()
    policy = copied(now, torch.bfloat16)
    check = proof_of(now, policy, half=True)
    old = {n: t.clone() for n, t in plain_tensors(now.model)}
    shares = [check({}, version=0, how="sync").share]
    for version in range(1, 60):
        moved(now, version, 1e-3)
        policy.load(((n, old[n] if forgotten in n else t) for n, t in plain_tensors(now.model)), version=version)
        try:
            shares.append(check({}, version=version, how="sync").share)
        except SyncError as error:
            assert "engine's followed by" in str(error)
            assert max(shares) < 1
            return
    pytest.fail("60 lost updates were not seen")


def test_a_stale_cache_is_seen_in_bfloat16() -> None:
    now = learner()
    policy = copied(now, torch.bfloat16)
    check = proof_of(now, policy, half=True)
    check({}, version=0, how="start")
    moved(now, 1, 0.01)
    with torch.no_grad():
        for mine, theirs in zip(now.model.parameters(), policy.model.parameters(), strict=True):
            theirs.copy_(mine)
    policy.version = 1  # and no refresh
    with pytest.raises(SyncError, match="stale cache"):
        check({}, version=1, how="sync")
    policy.refresh(version=1)
    check({}, version=1, how="sync")


def test_no_rounding_explains_other_weights_at_the_start() -> None:
    engine = copied(learner(), torch.bfloat16)
    for how in ({}, {"quantised": True}):
        with pytest.raises(SyncError, match="on the average token"):
            proof_of(learner(seed=1, std=0.1), engine, half=True, **how)({}, version=0, how="start")


def test_canaries_fit_a_short_context() -> None:
    short = ProbePrompts.of(100, 12, 1.0)
    assert {len(context) for context in short.contexts} == {6}
    assert all(context.max() < 100 for context in short.contexts)


def adapted() -> Any:
    model = load_model(None, lora=LoraConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_adapters_are_folded_in_one_tensor_at_a_time() -> None:
    model = adapted()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ours, theirs = dict(plain_tensors(model)), merged(model).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    base = load_model(None).state_dict()
    left_out = dict(plain_tensors(model, adapters=False))
    assert all(torch.equal(base[name], left_out[name]) for name in base)
    assert left_out.keys() == base.keys()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_an_adapter_is_what_peft_writes(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors, config = adapter_tensors(model)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], written[name]) for name in written)
    on_disk = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = json.loads(json.dumps(config))
    assert {key: ours[key] for key in ("r", "lora_alpha", "peft_type")} == {
        key: on_disk[key] for key in ("r", "lora_alpha", "peft_type")
    }
    assert sorted(ours["target_modules"]) == sorted(on_disk["target_modules"])


def config(**policy: Any) -> TrainConfig:
    lora = {"rank": 4} if policy.pop("lora", False) else None
    return load(TrainConfig, policy=policy, lora=lora)


@pytest.mark.parametrize(
    ("policy", "lora", "modes"),
    [
        ({}, False, ["shared"]),
        ({}, True, ["shared"]),
        ({"engine": "vllm"}, False, ["tensors"]),
        ({"engine": "vllm"}, True, ["adapter", "merged"]),
        ({"engine": "vllm", "sync": "restart"}, True, ["restart"]),
        ({"servers": ["http://localhost:1"]}, False, ["file"]),
        ({"servers": ["http://localhost:1"]}, True, ["adapter", "merged"]),
        ({"servers": ["http://localhost:1"], "sync": "disk"}, False, ["disk"]),
    ],
)
def test_the_modes_to_choose_from(policy: dict[str, Any], lora: bool, modes: list[str]) -> None:
    given = config(**policy, lora=lora)
    assert modes_of(given, engine_of(given)) == modes


def test_every_mode_has_an_engine_and_every_engine_that_trains_has_modes() -> None:
    from llm_gym.policies import ENGINES

    assert {engine for mode in MODES.values() for engine in mode.engines} <= ENGINES.keys()
    for engine in RECEIVERS:
        for adapters in (True, False):
            fit = [m for m in MODES.values() if engine in m.engines and m.adapters in (None, adapters)]
            assert any(m.automatic for m in fit) or len(fit) == 1


def test_every_mode_is_a_row_of_the_page_with_its_engines() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sync.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", page, re.MULTILINE)
    assert dict(rows) == {name: ", ".join(mode.engines) for name, mode in MODES.items()}


def test_engine_arguments_follow_the_run() -> None:
    plain = config(engine="vllm", vllm={"max_model_len": 64})
    assert engine_options(plain, "tensors") == {"dtype": "float32", "max_model_len": 64}
    half = dataclasses.replace(plain, optimizer=OptimizerConfig(dtype="bfloat16"))
    assert engine_options(half, "tensors")["dtype"] == "bfloat16"
    adapters = config(engine="vllm", lora=True)
    assert engine_options(adapters, "adapter") == {"dtype": "float32", "lora_rank": 4}
    assert engine_options(adapters, "merged") == {"dtype": "float32"}  # LoRA layers cost time even without an adapter


def test_a_run_reports_the_proof(tmp_path: Path) -> None:
    sets = ["eval.episodes=0", "steps=2", "prompts_per_step=2", "group_size=4", "sampling.max_tokens=12"]
    rows = Trainer(load(TrainConfig, sets=sets), out=tmp_path / "run").train()
    for row in rows[1:]:
        assert row["sync/mode"] == "shared"
        assert 0 <= row["sync/canary_gap_max"] < 1e-4
        assert 0 <= row["sync/canary_share"] < 0.1
        assert 0 < row["time/proof"] < row["time/sync"] < row["time/step"]


def test_a_run_in_bfloat16_is_not_stopped_by_its_own_rounding(tmp_path: Path) -> None:
    """Nothing is sent: the engine runs the learner's module, in float32."""
    sets = ["eval.episodes=0", "steps=12", "optimizer.dtype=bfloat16"]
    run = Trainer(load(TrainConfig, sets=sets, seed=0), out=tmp_path / "run")
    rows = [run.train_step() for _ in range(4)]
    run.close()
    assert all(row["sync/canary_gap_max"] < 1e-4 for row in rows)
    assert max(row["sampler/logprob_gap_max"] for row in rows) > 0.1, "where the old limit was"


def by_file(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    folder.mkdir()
    save_file({n: t.detach().clone() for n, t in seen(plain_tensors(model))}, folder / "all.safetensors")
    policy.load(load_file(folder / "all.safetensors").items(), version=version)
    (folder / "all.safetensors").unlink()
    folder.rmdir()


def by_refreshing(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.refresh(version=version)


def not_at_all(model: Any, policy: Any, version: int, folder: Path, seen: Seen) -> None:
    policy.version = version


BY_FILE = Mode(by_file, ("transformers",), "through a file")
IN_PLACE = Mode(by_refreshing, ("transformers",), "nothing moves", in_place=True)
NEVER = Mode(not_at_all, ("transformers",), "nothing arrives")


@pytest.mark.parametrize(("name", "lora"), [("BY_FILE", None), ("BY_FILE", {"rank": 4}), ("IN_PLACE", None)])
def test_a_mode_of_one_s_own_sends_every_step_and_is_proven(tmp_path: Path, name: str, lora: Any) -> None:
    sets = ["eval.episodes=0", "steps=2", "prompts_per_step=2", "group_size=4", "sampling.max_tokens=12"]
    given = load(TrainConfig, sets=[*sets, f"policy.sync={__name__}:{name}", "optimizer.lr=0.01"], lora=lora)
    run = Trainer(given, out=tmp_path / "run")
    assert (run.sync.policy.model is run.model) == (name == "IN_PLACE")
    rows = run.train()
    assert [(row["sync/mode"], row["sync/canary_share"] < 0.1) for row in rows[1:]] == [
        (f"{__name__}:{name}", True)
    ] * 2


def test_a_mode_of_one_s_own_that_sends_nothing_stops_the_run(tmp_path: Path) -> None:
    sets = ["eval.episodes=0", "steps=2", "prompts_per_step=4", "group_size=8", f"policy.sync={__name__}:NEVER"]
    with pytest.raises(SyncError, match=r"NEVER' after step 1: .*disagree"):
        Trainer(load(TrainConfig, sets=[*sets, "optimizer.lr=0.01"]), out=tmp_path / "run").train()


def test_a_mode_of_one_s_own_is_looked_at() -> None:
    given = config(sync=f"{__name__}:by_file")
    with pytest.raises(ConfigError, match=r"policy\.sync: got '.*by_file', which is <function .*, want a `Mode`"):
        modes_of(given, "transformers")
    with pytest.raises(ConfigError, match=r"BY_FILE' does not work with engine 'vllm' .*valid: auto, tensors"):
        modes_of(config(sync=f"{__name__}:BY_FILE", engine="vllm"), "vllm")


def test_a_run_whose_weights_do_not_arrive_stops(tmp_path: Path) -> None:
    sets = ["eval.episodes=0", "steps=2", "prompts_per_step=4", "group_size=8"]
    run = Trainer(load(TrainConfig, sets=[*sets, "optimizer.lr=0.01"]), out=tmp_path / "run")
    run.sync.policy = run.sync.proof.policy = TransformersPolicy(copy.deepcopy(run.model))
    with pytest.raises(SyncError, match=r"sync 'shared' after step 1: .*disagree"):
        run.train()
