"""The learner: one gradient whatever the split, transformers' log-probabilities, a step that is what it says."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, credit_of, gradients, llama, qwen3, row, sample, samples, saying
from torch import Tensor

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.algorithms.normalisers import NORMALISERS
from llm_gym.harness.algorithms.streams import Streams
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig, clip_gradients, lr_factor, parameter_groups
from llm_gym.harness.model.loading import LoraConfig, prepare
from llm_gym.harness.types import Batch, TrainSequence

LENGTHS = [24, 6, 17, 9, 31, 4, 12, 9]


def gradient(model: Any, batch: Batch, loss: LossConfig, **how: Any) -> dict[str, Tensor]:
    """The accumulated gradient of a whole batch, before clipping."""
    learner = Learner(model, loss=loss)
    for micro in batch.micro:
        learner.backward(micro, how.get("temperature", 1.0))
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# One gradient


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("loss", [LossConfig(clip_low=0.05, clip_high=0.1), LossConfig(entropy_weight=0.1)])
def test_the_gradient_does_not_depend_on_the_layout(normaliser: str, loss: LossConfig) -> None:
    """The same rows as 1 micro-batch of 8, 8 of 1, packed to a budget, shuffled: equal to 1e-9 in float64."""
    model = qwen3(dtype=torch.float64)
    rows = samples(LENGTHS)
    order = np.random.default_rng(3).permutation(len(rows))
    layouts = {
        "1x8": pack(rows, max_tokens=10**6, normaliser=normaliser),
        "8x1": pack(rows, max_tokens=1, normaliser=normaliser),
        "packed": pack(rows, max_tokens=40, normaliser=normaliser),
        "shuffled": pack([rows[i] for i in order], max_tokens=40, normaliser=normaliser),
    }
    assert [len(b.micro) for b in layouts.values()][:2] == [1, 8]
    loss = replace(loss, normaliser=normaliser)
    whole = gradient(model, layouts["1x8"], loss)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name in ("8x1", "packed", "shuffled"):
        assert_same(gradient(model, layouts[name], loss), whole, 1e-9)


def test_padded_rows_give_the_packed_gradient() -> None:
    model = qwen3(dtype=torch.float64)
    batch = pack(samples(LENGTHS), max_tokens=60)
    packed = gradient(model, batch, LossConfig())
    learner = Learner(model)
    learner.backbone.packed = False
    model.set_attn_implementation("sdpa")
    for micro in batch.micro:
        learner.backward(micro, 1.0)
    assert_same(gradients(model), packed, 1e-9)


def test_the_gradient_is_the_naive_one() -> None:
    """Against a loop over sequences with full logits and the formula written out."""
    model = qwen3(dtype=torch.float64)
    rows = samples(LENGTHS)
    got = gradient(model, pack(rows, max_tokens=50), LossConfig(clip_low=0.2, clip_high=0.3))
    model.set_attn_implementation("sdpa")
    loss = torch.zeros((), dtype=torch.float64)
    for s in rows:
        ids = torch.from_numpy(s.tokens).long()
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ratio = torch.exp(logp[s.trained - 1] - torch.from_numpy(s.streams["old_logprobs"]).double())
        loss = loss - torch.minimum(ratio * credit_of(s), ratio.clamp(0.8, 1.3) * credit_of(s)).sum()
    (loss / sum(len(s.trained) for s in rows)).backward()
    assert_same(got, gradients(model), 1e-6)  # advantages and weights are float32


def test_ten_against_a_thousand_tokens() -> None:
    """Unequal micro-batches: the gradient is that of the mean over 1010 tokens, not of a mean of means."""
    model = qwen3(dtype=torch.float64)
    rows = [sample(row(13, 0, prompt=3), 1.0, 0), sample(row(1003, 1, prompt=3), -0.5, 1)]
    apart, together = (gradient(model, pack(rows, max_tokens=n), LossConfig()) for n in (1, 10**4))
    assert_same(apart, together, 1e-9)


def test_zero_advantages_may_be_skipped() -> None:
    model = qwen3(dtype=torch.float64)
    rows = [sample(s, 0.0 if i % 2 else credit_of(s), i) for i, s in enumerate(samples(LENGTHS))]
    every, fewer = (gradient(model, pack(rows, max_tokens=50, skip_zero=s), LossConfig()) for s in (False, True))
    assert_same(every, fewer, 1e-12)


def test_an_episode_in_three_rows_weighs_what_its_tokens_weigh() -> None:
    """Under `sequence`, splitting an episode into rows changes no token's weight."""
    model = qwen3(dtype=torch.float64)
    short = [row(7, i, prompt=3) for i in range(3)]
    other = sample(row(20, 9), 1.0, 7)
    loss = LossConfig(normaliser="sequence")
    as_one = pack([*(sample(r, 1.0, 0) for r in short), other], max_tokens=100, normaliser="sequence")
    as_three = pack([*(sample(r, 1.0, i) for i, r in enumerate(short)), other], max_tokens=100, normaliser="sequence")
    weights = [sorted(set(b.micro[0].streams["weight"].tolist())) for b in (as_one, as_three)]
    assert weights[0] == pytest.approx([1 / 24, 1 / 20])
    assert weights[1] == pytest.approx([1 / 40, 1 / 16])
    assert as_one.episodes == 2
    assert gradient(model, as_one, loss).keys() == gradient(model, as_three, loss).keys()


# Log-probabilities


@pytest.mark.parametrize("make", [qwen3, llama])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_transformers_own(make: Any, temperature: float) -> None:
    """Teacher-forced, shifted by one, temperature included: to 1e-5 per token."""
    model = make()
    rows = samples(LENGTHS)
    learner = Learner(model)
    (micro,) = pack(rows, max_tokens=10**6).micro
    got, entropy = learner.logprobs(micro, temperature=temperature)
    model.set_attn_implementation("eager")
    want, disorder = [], []
    for s in sorted(rows, key=lambda s: -len(s.tokens)):
        ids = torch.from_numpy(s.tokens).long()
        with torch.no_grad():
            logp = (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        keep = s.trained - 1
        want.append(logp.gather(1, ids[1:, None])[keep, 0])
        disorder.append(-(logp.exp() * logp).sum(-1)[keep])
    torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(disorder), rtol=0, atol=1e-5)
    assert not got.requires_grad


def test_changing_one_sequence_leaves_the_others_bits() -> None:
    learner = Learner(qwen3())
    rows = samples(LENGTHS)
    (micro,) = pack(rows, max_tokens=10**6).micro
    before, _ = learner.logprobs(micro)
    for changed in range(len(LENGTHS)):
        tokens = micro.tokens.clone()
        start = sum(micro.lengths[:changed])
        tokens[start] = (tokens[start] + 1) % 61
        after, _ = learner.logprobs(replace(micro, tokens=tokens))
        others = micro.streams["sequence"] != changed
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[~others], after[~others])


def on_policy(learner: Learner, rows: list[TrainSequence], temperature: float = 1.0) -> list[TrainSequence]:
    """The same rows as if this policy had sampled them at this temperature."""
    made = []
    for s in rows:
        (micro,) = pack([s], max_tokens=10**6).micro
        made.append(saying(s, learner.logprobs(micro, temperature=temperature)[0].numpy()))
    return made


def test_right_after_a_sync_the_ratio_is_one_at_any_temperature() -> None:
    learner = Learner(qwen3())
    rows = on_policy(learner, samples(LENGTHS), temperature=0.6)
    metrics = learner.step(pack(rows, max_tokens=50), temperature=0.6)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["sampler/logprob_gap_max"] < 1e-5
    assert metrics["policy/clip_fraction"] == 0
    forgotten = learner.step(pack(rows, max_tokens=50), temperature=1.0)
    assert forgotten["sampler/logprob_gap_max"] > 0.1


def test_dropout_never_acts() -> None:
    """A model that asks for dropout, in train mode: old and new log-probabilities are one function."""
    model = qwen3(attention_dropout=0.5)
    plain = Learner(qwen3())
    model.train()
    learner = Learner(model)
    (micro,) = pack(samples(LENGTHS), max_tokens=10**6).micro
    assert not model.training
    first, second = (learner.logprobs(micro, grad=g)[0] for g in (False, True))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert torch.equal(first, plain.logprobs(micro)[0])


def test_bfloat16_computation_stays_near_and_leaves_the_weights_float32() -> None:
    model = qwen3(initializer_range=0.05)
    (micro,) = pack(samples(LENGTHS), max_tokens=10**6).micro
    exact, _ = Learner(model).logprobs(micro)
    learner = Learner(model, OptimizerConfig(dtype="bfloat16"))
    rough, _ = learner.logprobs(micro)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1
    learner.step(pack(samples(LENGTHS), max_tokens=100))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_pad_equal_to_eos_still_trains_the_final_eos() -> None:
    """The stop token is a target like any other; no id is special to the learner."""
    eos = 5
    model = qwen3(dtype=torch.float64, pad_token_id=eos, eos_token_id=eos)
    base = row(9, 0, prompt=4)
    tokens = base.tokens.copy()
    tokens[-1] = eos
    ended = sample(replace(base, tokens=tokens), 1.0, 0)
    (micro,) = pack([ended], max_tokens=100).micro
    assert micro.streams["target"][-1] == eos
    untied = Learner(model, loss=LossConfig(name="sft"))
    before = untied.logprobs(micro)[0][-1]
    untied.optimizers = [torch.optim.SGD([{"params": list(model.parameters()), "peak": 0.05}], lr=0.05)]
    last = replace(base, tokens=tokens, trained=np.array([8]), streams={"old_logprobs": np.zeros(1)})
    untied.step(pack([sample(last, 1.0, 0)], max_tokens=100))
    assert untied.logprobs(micro)[0][-1] > before


# The step


def test_parameter_groups_read_back() -> None:
    model = prepare(qwen3(attention_bias=True))
    learner = Learner(model, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    (adamw,) = learner.optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, decay in decays.items():
        assert decay == (0 if "norm" in name or "bias" in name else 0.1), name
    assert decays["model.layers.0.self_attn.q_proj.weight"] == 0.1


def test_adapters_are_never_decayed_and_the_base_is_in_no_group() -> None:
    model = prepare(qwen3(), lora=LoraConfig(rank=2))
    (adamw,) = Learner(model, OptimizerConfig(weight_decay=0.1)).optimizers
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.0]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == trainable


def test_muon_takes_the_hidden_matrices_only() -> None:
    for model in (qwen3(), llama()):
        groups = parameter_groups(model, OptimizerConfig(name="muon"))
        names = {id(p): n for n, p in model.named_parameters()}
        assert {names[id(p)].rsplit(".", 2)[1] for p in groups["hidden"]} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
        assert sum(len(g) for g in groups.values()) == len(names)
        learner = Learner(model, OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02), total_steps=4)
        learner.step(pack(samples(LENGTHS), max_tokens=100))
        assert [g["lr"] for o in learner.optimizers for g in o.param_groups] == [1e-3, 1e-3, 0.02]


@pytest.mark.parametrize("bound", [0.0, 1e-3, 1e3])
def test_the_norm_after_clipping_keeps_the_bound(bound: float) -> None:
    model = qwen3()
    learner = Learner(model)
    for micro in pack(samples(LENGTHS), max_tokens=60).micro:
        learner.backward(micro, 1.0)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    assert clip_gradients(model.parameters(), bound) == pytest.approx(norm, rel=1e-5)
    after = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    assert after == pytest.approx(min(norm, bound or math.inf), rel=1e-3)


def test_the_step_uses_the_clipped_gradient() -> None:
    """With SGD the step's length is lr * min(norm, bound)."""
    model = qwen3()
    learner = Learner(model, OptimizerConfig(max_grad_norm=0.01))
    learner.optimizers = [torch.optim.SGD([{"params": list(model.parameters()), "peak": 1.0}], lr=1.0)]
    before = [p.detach().clone() for p in model.parameters()]
    norm = learner.step(pack(samples(LENGTHS), max_tokens=60))["policy/grad_norm"]
    steps = [(p.detach() - b).square().sum() for p, b in zip(model.parameters(), before, strict=True)]
    length = math.sqrt(float(sum(steps)))
    assert norm > 0.02
    assert length == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    model = qwen3()
    next(model.parameters()).data[0] = math.nan
    with pytest.raises((FloatingPointError, ConfigError)):
        Learner(model).step(pack(samples(LENGTHS), max_tokens=60))
    model = qwen3()
    learner = Learner(model)
    rows = [sample(s, math.inf, s.episode) for s in samples(LENGTHS)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="weights were left as they are"):
        learner.step(pack(rows, max_tokens=60))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_schedule_closed_forms() -> None:
    def curve(total: int, **fields: Any) -> list[float]:
        return [lr_factor(k, total, OptimizerConfig(**fields)) for k in range(total)]

    assert curve(3) == [1, 1, 1]
    assert curve(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert curve(4, schedule="linear", floor=0.5) == [1, 0.875, 0.75, 0.625]
    assert curve(4, warmup_steps=4) == [0.25, 0.5, 0.75, 1]
    assert curve(4, schedule="cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert lr_factor(9, 4, OptimizerConfig(schedule="linear")) == 0


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_schedule_counts_optimizer_steps_not_micro_batches(budget: int) -> None:
    learner = Learner(qwen3(), OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=2), total_steps=4)
    rates = [learner.step(pack(samples(LENGTHS), max_tokens=budget))["policy/lr"] for _ in range(4)]
    assert rates == [0.5, 0.75, 0.5, 0.25]
    assert learner.optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(kl="k2", kl_weight=0.1, entropy_weight=0.01)])
def test_metrics_do_not_depend_on_the_split(loss: LossConfig) -> None:
    every = []
    for budget in (1, 40, 10**6):
        learner = Learner(qwen3(), OptimizerConfig(lr=1e-3), loss, total_steps=3)
        learner.step(pack(samples(LENGTHS), max_tokens=budget))
        every.append(learner.step(pack(samples(LENGTHS), max_tokens=budget)))
    for other in every[1:]:
        assert other == pytest.approx(every[0], rel=1e-3, abs=1e-6)
    assert every[0]["tokens/trained"] == sum(len(s.trained) for s in samples(LENGTHS))
    assert ("policy/kl" in every[0]) == loss.uses_reference


def test_a_step_without_a_gradient_moves_the_clock_only() -> None:
    model = qwen3()
    learner = Learner(model, OptimizerConfig(lr=1e-3, schedule="linear"), total_steps=4)
    learner.step(pack(samples(LENGTHS), max_tokens=100))
    before = copy.deepcopy(model.state_dict())
    empty = pack([sample(s, 0.0, s.episode) for s in samples(LENGTHS)], max_tokens=100, skip_zero=True)
    metrics = learner.step(empty)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert metrics["policy/grad_norm"] == metrics["policy/loss"] == 0
    assert math.isnan(metrics["policy/entropy"])
    assert learner.step_count == 2


# Reference


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_the_kl_is_zero_at_the_start_and_pulls_back_later(lora: LoraConfig | None) -> None:
    model = prepare(qwen3(), lora=lora)
    learner = Learner(model, OptimizerConfig(lr=1e-2), LossConfig(kl="k2", kl_weight=1.0), total_steps=9)
    rows = on_policy(learner, samples(LENGTHS))
    quiet = [sample(s, 0.0, s.episode) for s in rows]
    first = learner.step(pack(quiet, max_tokens=60))
    assert first["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert first["policy/grad_norm"] == pytest.approx(0, abs=1e-5)
    for _ in range(3):
        away = learner.step(pack(rows, max_tokens=60))
    assert away["policy/kl"] > 1e-3
    for _ in range(5):
        back = learner.step(pack(quiet, max_tokens=60))
    assert back["policy/kl"] < away["policy/kl"]


def test_a_large_weight_holds_the_policy_at_the_reference() -> None:
    """Whatever the rewards ask for; without the pull the same steps lead far away."""
    held, free = (distance(loss) for loss in (LossConfig(kl="k1", kl_weight=100.0), LossConfig()))
    assert held < 0.02 < 0.1 < free, (held, free)


def distance(loss: LossConfig, steps: int = 24) -> float:
    """KL from the start (nats), after steps whose tokens the policy itself has drawn; even ones are rewarded."""
    model = qwen3()
    learner = Learner(model, OptimizerConfig(lr=1e-3, schedule="linear"), loss, total_steps=steps)
    contexts = torch.randint(0, VOCABULARY, (64, 4), generator=torch.Generator().manual_seed(0))
    start = model(contexts).logits[:, -1].detach().log_softmax(-1)
    for step in range(steps):
        logits = model(contexts).logits[:, -1].detach().log_softmax(-1)
        drawn = torch.multinomial(logits.exp(), 1, generator=torch.Generator().manual_seed(step))
        old = logits.gather(1, drawn)
        tokens = torch.cat([contexts, drawn], 1).int()
        rows = [
            sample(saying(replace(row(5, 0, prompt=4), tokens=ids), said), 1.0 - 2.0 * (int(ids[-1]) % 2), i)
            for i, (ids, said) in enumerate(zip(tokens.numpy(), old.numpy(), strict=True))
        ]
        learner.step(pack(rows, max_tokens=1000))
    end = model(contexts).logits[:, -1].detach().log_softmax(-1)
    return float((end.exp() * (end - start)).sum(-1).mean())


def test_the_reference_is_frozen() -> None:
    model = qwen3()
    learner = Learner(model, OptimizerConfig(lr=1e-2), LossConfig(kl="k3", kl_weight=0.1))
    assert learner.reference is not None
    before = copy.deepcopy(learner.reference.model.state_dict())
    learner.step(pack(samples(LENGTHS), max_tokens=60))
    assert all(torch.equal(t, before[n]) for n, t in learner.reference.model.state_dict().items())
    assert not any(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "proj" in n)
    assert Learner(qwen3()).reference is None


# Resume


@pytest.mark.parametrize(
    "settings", [OptimizerConfig(lr=1e-3, schedule="cosine"), OptimizerConfig(name="muon", lr=1e-3)]
)
def test_two_and_three_steps_are_five(settings: OptimizerConfig) -> None:
    def run(learner: Learner, steps: range) -> None:
        for k in steps:
            learner.step(pack(samples(LENGTHS, seed=k), max_tokens=60))

    whole = Learner(qwen3(), settings, total_steps=5)
    run(whole, range(5))
    first = Learner(qwen3(), settings, total_steps=5)
    run(first, range(2))
    saved = copy.deepcopy((first.model.state_dict(), first.state_dict()))
    second = Learner(qwen3(seed=9), settings, total_steps=5)
    second.model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    run(second, range(2, 5))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name: unknown value 'adam'; did you mean 'adamw'"):
        OptimizerConfig(name="adam")
    with pytest.raises(ConfigError, match=r"optimizer\.lr: got -1"):
        OptimizerConfig(lr=-1.0)
    with pytest.raises(ConfigError, match=r"optimizer\.dtype"):
        OptimizerConfig(dtype="float8")
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Learner(qwen3().requires_grad_(False))


def test_a_custom_loss_by_import_path() -> None:
    loss = LossConfig(name="test_learner:reinforce")
    a, b = (gradient(qwen3(), pack(samples(LENGTHS), max_tokens=60), x) for x in (loss, LossConfig()))
    assert a.keys() == b.keys()


def reinforce(s: Streams, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The plainest policy gradient."""
    return -s.logprobs * s.advantages, {}


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    """As a target it would be in no block of the head, and its log-probability nonsense."""
    bad = TrainSequence(np.array([1, 99], np.int32), np.array([1]), {"old_logprobs": np.zeros(1)})
    with pytest.raises(ValueError, match=r"targets: got 99, want ids in \[0, 61\)"):
        Learner(qwen3()).step(pack([sample(bad, 1.0, 0)], max_tokens=9))
