"""Distillation: the right gradient, through the trainer's own loop, and mistakes found before a model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import gradients, qwen3, samples

from llm_gym import embedded
from llm_gym.errors import SettingError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.config import DistillConfig
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.learner.token_budget import Budget
from llm_gym.harness.loops import group_learner
from llm_gym.harness.loops.distill import DistillGroupLearner, DistillLearner, group_learner_of
from llm_gym.harness.loops.group_learner import GroupLearner
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.teacher import LocalTeacher, ServedTeacher, Teacher
from llm_gym.harness.model.loading import Backbone, export, load_model

DOUBLE = torch.float64
SMALL = ["eval.episodes=4", "sampling.max_tokens=12", "prompts_per_step=2", "group_size=2", "checkpoint.every=2"]


def judge(seed: int = 9) -> LocalTeacher:
    made = LocalTeacher.__new__(LocalTeacher)
    made.backbone, made.temperature = Backbone(qwen3(seed, dtype=DOUBLE, hidden_size=40)), 1.0
    return made


def learner(kl: str, model: Any, teacher: Teacher, loss: LossConfig | None = None, top_k: int = 4) -> DistillLearner:
    settings = DistillConfig(teacher="x", kl=kl, top_k=top_k)
    return DistillLearner(model, OptimizerConfig(lr=1e-3), loss or LossConfig(), teacher=teacher, settings=settings)


def naive(model: Any, teacher: LocalTeacher, every: list, kl: str, k: int) -> torch.Tensor:
    """Mean over trained tokens, a row at a time, with whole distributions."""
    total, count = torch.zeros((), dtype=DOUBLE), 0
    for sample in every:
        ids, trained = torch.from_numpy(sample.tokens).long(), sample.trained - 1
        p = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)[trained]
        with torch.no_grad():
            q = teacher.backbone.causal(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)[trained]
        if kl == "top_k":
            best = q.topk(k, 1).indices
            p, q = (x.exp().gather(1, best) for x in (p, q))
            p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1).log() for x in (p, q))
        if kl == "sampled":
            picked, other = (x.gather(1, ids[1:][trained][:, None])[:, 0] for x in (p, q))
            old = torch.from_numpy(sample.streams["old_logprobs"]).double()
            # PPO's gradient with a bound that no ratio reaches: ratio * advantage.
            total, count = total - ((picked - old).exp() * (other - old)).sum(), count + len(picked)
        else:
            total, count = total + (p.exp() * (p - q)).sum(), count + len(p)
    return total / count


@pytest.mark.parametrize("kl", ["sampled", "top_k", "full"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("share", [False, True])
def test_the_gradient_is_that_of_whole_distributions_row_by_row(kl: str, budget: int, share: bool) -> None:
    """In float64 but for the streams (weights and old log-probabilities), which are float32."""
    model, teacher, every = qwen3(1, dtype=DOUBLE), judge(), samples([24, 6, 17, 9])
    want = naive(model, teacher, every, kl, 4)
    want.backward()
    wanted = gradients(model)
    model.zero_grad()
    unbounded = LossConfig(clip_low=1.0, clip_high=1e9) if kl == "sampled" else None
    made = learner(kl, model, teacher, unbounded)
    batch = pack(every, max_tokens=budget, share=share)
    loss = sum(made.backward(micro, 1.0)["policy/loss"] for micro in batch.micro)
    assert loss == pytest.approx(float(want.detach()), rel=1e-5)
    for name, ours in gradients(model).items():
        torch.testing.assert_close(ours, wanted[name], rtol=1e-4, atol=1e-6 * float(wanted[name].abs().max()))


def test_full_is_top_k_with_every_token() -> None:
    model, teacher, every = qwen3(1, dtype=DOUBLE), judge(), samples([24, 6, 17, 9])
    (micro,) = pack(every, max_tokens=1000).micro
    learner("full", model, teacher).backward(micro, 1.0)
    full = gradients(model)
    model.zero_grad()
    learner("top_k", model, teacher, top_k=61).backward(micro, 1.0)
    for name, ours in gradients(model).items():
        torch.testing.assert_close(ours, full[name], rtol=1e-9, atol=1e-12)


def test_a_step_reports_what_every_learner_reports() -> None:
    every = samples([24, 6, 17, 9])
    plain = Learner(qwen3(1), OptimizerConfig(lr=1e-3), LossConfig()).step(pack(every, max_tokens=1000))
    for kl in ("sampled", "top_k", "full"):
        teacher = judge()
        teacher.backbone = Backbone(qwen3(9))
        row = learner(kl, qwen3(1), teacher).step(pack(every, max_tokens=1000))
        assert row.keys() == {*plain, "distill/kl"} - ({"policy/clip_fraction"} if kl != "sampled" else set())
        for name in ("policy/entropy", "policy/ratio_mean", "sampler/logprob_gap_mean", "tokens/trained"):
            assert row[name] == pytest.approx(plain[name], rel=1e-5), name
        assert row["policy/grad_norm"] > 0
        assert kl == "sampled" or row["distill/kl"] == pytest.approx(row["policy/loss"], rel=1e-5)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model with moved weights."""
    folder = tmp_path_factory.mktemp("teacher")
    model = load_model(None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    export(model, folder)
    for file in embedded.PATH.glob("*"):
        if "token" in file.name or "chat" in file.name or "generation" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def config(*sets: str, teacher: str, **given: Any) -> TrainConfig:
    return load(TrainConfig, sets=[*SMALL, f"distill.teacher={teacher}", *sets], **given)


@pytest.mark.parametrize("kl", ["sampled", "top_k", "full"])
def test_the_student_comes_nearer(tmp_path: Path, teacher_folder: str, kl: str) -> None:
    """The same loop as training: rewards, checkpoints and evaluation are there, and the divergence falls."""
    settings = config(f"distill.kl={kl}", "optimizer.lr=5e-4", "group_size=8", "steps=6", teacher=teacher_folder)
    assert group_learner_of(settings) is DistillGroupLearner
    rows = Trainer(settings, out=tmp_path / "run").train()
    assert [row["step"] for row in rows] == list(range(7))
    assert {"reward/mean", "distill/kl"} <= rows[1].keys()
    assert rows[6]["distill/kl"] < 0.8 * rows[1]["distill/kl"]
    assert rows[1]["sampler/logprob_gap_max"] < 1e-4
    assert load(TrainConfig, tmp_path / "run/config.yaml").distill.kl == kl


class StopAfter(Observer):
    """Dies after some rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def on_row(self, row: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, teacher_folder: str) -> None:
    settings = config("distill.kl=full", "steps=4", teacher=teacher_folder)
    whole = Trainer(settings, out=tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings, out=tmp_path / "cut", observer=StopAfter(4)).train()
    again = Trainer(settings, out=tmp_path / "cut", resume=True)
    assert again.step == 2
    rows = again.train()
    for name in ("distill/kl", "policy/loss", "policy/grad_norm", "reward/mean"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in whole]


def test_a_step_without_groups_leaves_the_weights_alone(tmp_path: Path, teacher_folder: str) -> None:
    """Every group may fail a filter."""
    run = Trainer(config("distill.kl=full", "minibatches=2", teacher=teacher_folder), out=tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert [batch.tokens for batch in run.learning.batches([])] == [0, 0]
    run.learning.learn([], 0)
    run.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["distill.teacher=''"], "distill.teacher: got nothing"),
        (["distill.teacher=no/such/model/here"], "no/such/model/here"),
        (["distill.kl=ful"], "did you mean 'full'"),
        (["advantage=rloo"], "advantage: got 'rloo'"),
        (["overlong=0.2"], "overlong: got 0.2"),
        (["distill.kl=full", "loss.clip_high=0.3"], "only the normaliser can be chosen"),
        (["distill.teacher=http://127.0.0.1:1", "sampling.temperature=0.5"], "servers score at 1 only"),
    ],
)
def test_mistakes_are_found_before_the_model_loads(
    tmp_path: Path, monkeypatch, teacher_folder: str, sets, said
) -> None:
    monkeypatch.setattr(group_learner, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SettingError, match=said):
        Trainer(config(*sets, teacher=teacher_folder), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_teacher_it_is_the_trainer() -> None:
    assert group_learner_of(TrainConfig()) is GroupLearner


@pytest.mark.parametrize("kl", ["sampled", "top_k"])
def test_servers_are_not_asked_while_memory_is_measured(kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        pytest.fail("the server was asked")

    teacher = ServedTeacher.__new__(ServedTeacher)
    for name in ("logprobs", "top"):
        monkeypatch.setattr(teacher, name, asked)
    made = learner(kl, qwen3(1), teacher)
    told: list[str] = []
    assert Budget("auto", made, told.append).tokens >= 1024
    assert made.teacher is teacher
    assert len(told) == 1
    every = pack(samples([24, 6]), max_tokens=100)
    made.dry_run(every.micro[0])
    assert all(bool(grad.isfinite().all()) for grad in gradients(made.model).values())
