"""Fine-tuning: exact ids, the assistant's tokens only, and a model that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_models import sample
from test_parallel import Told

from llm_gym import embedded
from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.errors import CheckpointError, ConfigError, DataError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.batching.packing import pack, trained_tokens
from llm_gym.harness.batching.shards import deal, pack_shard
from llm_gym.harness.config import CheckpointConfig
from llm_gym.harness.data.sft_examples import encode
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.loops.sft import SFTConfig, SFTEvalConfig, held_out_loss, indices, prepare, sft
from llm_gym.harness.model.loading import LoraConfig, load_model, new_model
from llm_gym.harness.settings import load

INIT = {
    "model_type": "qwen3",
    "vocab_size": json.loads((embedded.PATH / "config.json").read_text())["vocab_size"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}


def chats(count: int) -> list[dict]:
    """Questions with one-word answers: the question's last word."""
    return [chat(f"Say {('red', 'blue', 'green')[i % 3]}", ("red", "blue", "green")[i % 3]) for i in range(count)]


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, examples: list[dict]) -> str:
    path.write_text("".join(json.dumps(e) + "\n" for e in examples))
    return str(path)


def config(tmp_path: Path, **fields) -> SFTConfig:
    return SFTConfig(
        **{
            "init": INIT,
            "out": str(tmp_path / "run"),
            "steps": 80,
            "examples_per_step": 6,
            "optimizer": OptimizerConfig(name="muon", lr=1e-2, schedule="linear"),
            **fields,
        }
    )


def test_a_run_from_a_file_learns_and_leaves_a_folder(tmp_path: Path) -> None:
    settings = config(tmp_path, dataset=write(tmp_path / "chats.jsonl", chats(30)))
    model = sft(settings, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert rows[0]["loss"] == pytest.approx(np.log(INIT["vocab_size"]), rel=0.1)
    assert rows[-1]["loss"] < 0.3
    assert load(SFTConfig, tmp_path / "run/config.yaml") == settings.resolved()
    loaded = load_model(tmp_path / "run/model")
    tokenizer = load_tokenizer(str(tmp_path / "run/model"))
    context = load_chat(tokenizer).open([{"role": "user", "content": "Say blue"}])
    with torch.no_grad():
        for each in (model, loaded):
            out = each.generate(
                torch.from_numpy(context)[None].long(), do_sample=False, max_new_tokens=8, eos_token_id=2
            )
            assert load_chat(tokenizer).text(out[0, len(context) :].numpy()) == "blue"


def test_a_run_is_a_function_of_its_configuration() -> None:
    settings = SFTConfig(init=INIT, steps=3, examples_per_step=4)
    a, b, c = (sft(x, chats(10), progress=False) for x in (settings, settings, replace(settings, seed=1)))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


def test_generated_chats_are_asked_for_by_step() -> None:
    asked = []

    def make(step: int) -> list[dict]:
        asked.append(step)
        return chats(4)

    model = sft(SFTConfig(init=INIT, steps=3), make, progress=False)
    again = sft(SFTConfig(steps=2), make, model=model, progress=False)
    assert asked == [0, 1, 2, 0, 1]
    assert again is model


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_long_chats_are_dropped_or_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = chat("Say red", "red " * 100)
    sft(config(tmp_path, steps=1, max_length=60), [*chats(3), long], progress=True)
    assert rows_of(tmp_path / "run")[0]["data/dropped"] == 1
    assert "1 of 4 chats are longer than 60 tokens, and dropped" in capsys.readouterr().out
    sft(config(tmp_path / "b", steps=1, max_length=60, long="cut"), [*chats(3), long], progress=True)
    row = rows_of(tmp_path / "b" / "run")[0]
    assert (row["data/dropped"], row["data/cut"]) == (0, 1)
    assert "1 of 4 chats are longer than 60 tokens, and cut" in capsys.readouterr().out
    with pytest.raises(DataError, match="longer than max_length=5"):
        sft(SFTConfig(init=INIT, max_length=5), chats(3), progress=False)


def test_every_pass_holds_every_chat_once() -> None:
    settings = SFTConfig(examples_per_step=4)
    seen = np.concatenate([indices(step, 10, settings) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert sorted(np.bincount(indices(1, 3, SFTConfig(examples_per_step=7)))) == [2, 2, 3]


def test_epochs_are_passes() -> None:
    asked = prepare(SFTConfig(epochs=1.5, examples_per_step=4), chats(10), load_tokenizer())
    assert asked.steps == 4


def naive(model, rows) -> torch.Tensor:
    """Mean cross-entropy over all trained tokens, a chat at a time, by transformers' own forward."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()
        logp = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        picked = logp.gather(1, ids[1:, None])[:, 0][row.trained - 1]
        total, count = total - picked.sum(), count + len(picked)
    return total / count


def wild() -> list[dict]:
    """Chats of very different lengths, two of several turns, one with a turn that is not trained."""
    turns = [("a", "b c d"), ("e" * 40, "f"), ("g", "h i " * 20)]
    talk = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    part = [dict(m, train=False) if m["content"] == "f" else m for m in talk]
    return [*chats(5), {"messages": talk}, {"messages": part}]


@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_loss_and_gradient_are_those_of_one_chat_at_a_time(budget: int) -> None:
    """In float64; 1/tokens is a float32, hence 1e-6."""
    rows = [encode(chat, load_tokenizer()) for chat in wild()]
    model = new_model(INIT, seed=3).double()
    want = naive(model, rows)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    want = want.detach()
    learner = Learner(model, OptimizerConfig(lr=1e-3), LossConfig(name="sft"))
    batch = pack([sample(row, 1.0, i) for i, row in enumerate(rows)], max_tokens=budget)
    assert len(batch.micro) == {1: 7, 150: 3, 10_000: 1}[budget]
    losses = [learner.backward(micro, 1.0)["policy/loss"] for micro in batch.micro]
    assert sum(losses) == pytest.approx(float(want), rel=1e-6)
    for ours, theirs in zip((p.grad for p in model.parameters()), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    found = held_out_loss(learner, batch)
    assert found["eval/loss"] == pytest.approx(float(want), rel=1e-12)
    assert found["eval/perplexity"] == pytest.approx(np.exp(float(want)), rel=1e-12)
    assert found["eval/tokens"] == sum(len(row.trained) for row in rows)


def test_held_out_loss_from_a_split_and_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "chats.jsonl", chats(30))
    other = write(tmp_path / "other.jsonl", [chat("Say grey", "grey")] * 4)
    settings = config(
        tmp_path, dataset=file, steps=4, split="train[:20]", eval=SFTEvalConfig(split="train[20:]", every=2)
    )
    model = sft(settings, progress=True)
    assert "10 of 10 held-out chats are trained on too" in capsys.readouterr().out
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 4]
    held_out = [encode(e, load_tokenizer()) for e in chats(30)[20:]]
    assert rows[-1]["eval/loss"] == pytest.approx(float(naive(model.double(), held_out).detach()), rel=1e-5)
    sft(config(tmp_path / "b", dataset=file, steps=2, eval=SFTEvalConfig(dataset=other)), progress=False)
    rows = rows_of(tmp_path / "b" / "run")
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2]
    tokens = len(encode(chat("Say grey", "grey"), load_tokenizer()).trained)
    assert (rows[-1]["eval/tokens"], rows[1]["data/also_held_out"]) == (4 * tokens, 0)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, lora: LoraConfig | None, monkeypatch) -> None:
    from llm_gym.harness.loops import sft as module

    settings = SFTConfig(
        init={} if lora else INIT, lora=lora, steps=5, examples_per_step=4, checkpoint=CheckpointConfig(every=2, keep=1)
    )
    whole = sft(replace(settings, out=str(tmp_path / "whole")), chats(10), progress=False)
    step = module.train_step

    def dies(learner, data, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(learner, data, number)

    cut = replace(settings, out=str(tmp_path / "cut"))
    monkeypatch.setattr(module, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        sft(cut, chats(10), progress=False)
    monkeypatch.setattr(module, "train_step", step)
    with pytest.raises(CheckpointError, match="--resume"):
        sft(cut, chats(10), progress=False)
    again = sft(cut, chats(10), progress=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    stable = [
        [{k: v for k, v in r.items() if k != "time/step"} for r in rows_of(tmp_path / n)] for n in ("whole", "cut")
    ]
    assert stable[0] == stable[1]


@pytest.mark.parametrize("lr", [None, 3e-4])
def test_a_run_goes_on_at_the_rate_that_it_began_with(tmp_path: Path, lr: float | None) -> None:
    """Also one of an older version, which left the rate open in its settings and took another."""
    begun = config(tmp_path, steps=2, optimizer=OptimizerConfig(schedule="constant"))
    begun = replace(begun, checkpoint=CheckpointConfig(every=2))
    sft(replace(begun, optimizer=replace(begun.optimizer, lr=lr or 2e-3)), chats(10), progress=False)
    file = Path(str(begun.out)) / "config.yaml"
    settings = yaml.safe_load(file.read_text("utf-8"))
    settings["optimizer"] |= {"lr": lr}
    file.write_text(yaml.safe_dump(settings), "utf-8")
    for steps in (3, 4):
        sft(replace(begun, steps=steps), chats(10), progress=False, resume=True)
    assert [row["lr"] for row in rows_of(Path(str(begun.out)))] == [lr or 2e-3] * 4


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"want a hub id or a file"):
        sft(SFTConfig(init=INIT), progress=False)
    with pytest.raises(ConfigError, match="set one of them"):
        SFTConfig(init=INIT, model="x/y")
    with pytest.raises(ConfigError, match="steps: got 0"):
        SFTConfig(steps=0)
    assert SFTConfig().resolved().optimizer.lr == 5e-4
    assert SFTConfig(lora=LoraConfig()).resolved().optimizer.lr == 5e-3
    assert SFTConfig(init=INIT).resolved().optimizer.lr == 2e-3
    assert SFTConfig(optimizer=OptimizerConfig(lr=1.0)).resolved().optimizer.lr == 1.0


def test_a_budget_that_is_measured_is_written_down_and_changes_nothing(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "chats.jsonl", wild())
    smooth = OptimizerConfig(lr=1e-3, eps=1e-3)
    a, b = (
        sft(config(tmp_path / name, dataset=file, steps=2, token_budget=budget, optimizer=smooth), progress=True)
        for name, budget in (("a", "auto"), ("b", 20))
    )
    assert "tokens a micro-batch." in capsys.readouterr().out
    written = load(SFTConfig, tmp_path / "a" / "run" / "config.yaml").token_budget
    assert isinstance(written, int)
    assert written > 20
    assert load(SFTConfig, tmp_path / "b" / "run" / "config.yaml").token_budget == 20
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="token_budget: got 0, want at least 1, or auto"):
        SFTConfig(token_budget=0)


def test_held_out_tokens_of_other_processes_count() -> None:
    rows = [sample(encode(chat, load_tokenizer()), 1.0, i) for i, chat in enumerate(wild())]
    learner = Learner(new_model(INIT, seed=3).double(), OptimizerConfig(lr=1e-3), LossConfig(name="sft"))
    whole = held_out_loss(learner, pack(rows, max_tokens=150))
    sums, counts = {}, trained_tokens(rows)
    for rank in range(2):
        learner.world = Told(rank, 2, lambda value: [counts])
        share = pack_shard(learner.world, deal(learner.world, rows), max_tokens=150)
        learner.world = Told(rank, 2, lambda value: [value, {"loss": 7.0}])
        sums[rank] = held_out_loss(learner, share)["eval/loss"] * share.tokens - 7.0
        assert 0 < sums[rank] / share.tokens < whole["eval/loss"]
    assert sum(sums.values()) / whole["eval/tokens"] == pytest.approx(whole["eval/loss"], rel=1e-12)
