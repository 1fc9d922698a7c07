"""Fine-tuning: exact ids, the assistant's tokens only, and a model that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_gym import embedded
from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.errors import ConfigError, DataError
from llm_gym.harness.config import load
from llm_gym.harness.optimizers import OptimizerConfig
from llm_gym.harness.model import LoraConfig, load_model
from llm_gym.harness.sft import SFTConfig, encode, read_examples, sft

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
PARAMETERS = {"type": "object", "properties": {"code": {"type": "string"}}}
TOOL = {
    "type": "function",
    "function": {"name": "python", "description": "Runs code.", "parameters": PARAMETERS},
}


def chats(count: int) -> list[dict]:
    """Questions with one-word answers: the question's last word."""
    return [chat(f"Say {('red', 'blue', 'green')[i % 3]}", ("red", "blue", "green")[i % 3]) for i in range(count)]


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, examples: list[dict]) -> str:
    path.write_text("".join(json.dumps(e) + "\n" for e in examples))
    return str(path)


def trained_texts(row, tokenizer) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.trained.astype(int), [0]])))
    return [tokenizer.decode(row.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_only_what_the_assistant_said_is_trained_stop_token_included() -> None:
    tokenizer = load_tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "Let me see."},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Thanks; nobody answers this."},
    ]
    row = encode({"messages": messages}, tokenizer)
    stop = tokenizer.decode([load_chat(tokenizer).stop_ids[0]])
    assert trained_texts(row, tokenizer) == ["Let me see." + stop, "4" + stop]
    assert set(row.turns[row.trained].tolist()) == {0, 1}
    assert "nobody" not in tokenizer.decode(row.tokens)
    for needed in ("Be brief.", "2+2?", "So?"):
        assert needed in tokenizer.decode(row.tokens[~row.trained])


def test_the_ids_are_those_of_an_episode() -> None:
    """Open, reply, extend: what an environment shows and a policy samples."""
    tokenizer = load_tokenizer()
    chat = load_chat(tokenizer, [TOOL])
    user, tool = {"role": "user", "content": "7*8?"}, {"role": "tool", "content": "56"}
    call = '<tool_call>{"name": "python", "arguments": {"code": "7*8"}}</tool_call>'
    messages = [user, {"role": "assistant", "content": call}, tool, {"role": "assistant", "content": "56"}]
    row = encode({"messages": messages, "tools": [TOOL]}, tokenizer)
    first, second = chat.encode_reply(call), chat.encode_reply("56")
    want = np.concatenate([chat.open([user]), first, chat.extend(first, [tool]), second])
    np.testing.assert_array_equal(row.tokens, want)
    assert row.trained.sum() == len(first) + len(second)
    assert not np.array_equal(row.tokens[:8], encode({"messages": messages}, tokenizer).tokens[:8])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "user", "content": "hi"}], "an assistant message"),
        ([{"role": "assistant", "content": "hi"}], "a prompt and then"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}], "plain text"),
    ],
)
def test_chats_that_train_nothing_are_refused(messages: list[dict], match: str) -> None:
    with pytest.raises(DataError, match=match):
        encode({"messages": messages}, load_tokenizer())


def test_files_are_read_or_refused_by_line(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "a.jsonl", chats(3))) == chats(3)
    with pytest.raises(DataError, match="cannot read"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_text('{"messages": []}\n{"mesages": []}\n')
    with pytest.raises(DataError, match=r"line 2 .* no list of messages"):
        read_examples(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("\n{oops\n")
    with pytest.raises(DataError, match=r"line 2 .* is not JSON"):
        read_examples(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no chat"):
        read_examples(tmp_path / "d.jsonl")


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
    settings = config(tmp_path, data=write(tmp_path / "chats.jsonl", chats(30)))
    model = sft(settings, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert rows[0]["loss"] == pytest.approx(np.log(INIT["vocab_size"]), rel=0.1)
    assert rows[-1]["loss"] < 0.3
    assert load(SFTConfig, tmp_path / "run/config.yaml") == settings
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


def test_long_chats_are_left_out_and_counted(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]}
    sft(config(tmp_path, steps=1, max_length=60), [*chats(3), long], progress=False)
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert row["data/dropped"] == 1
    with pytest.raises(DataError, match="longer than max_length=5"):
        sft(SFTConfig(init=INIT, max_length=5), chats(3), progress=False)


def test_every_pass_holds_every_chat_once(tmp_path: Path) -> None:
    from llm_gym.harness.sft import _order

    stream = _order(10, SFTConfig(examples_per_step=4))
    seen = np.concatenate([next(stream) for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"want a \.jsonl file"):
        sft(SFTConfig(init=INIT), progress=False)
    with pytest.raises(ConfigError, match="set one of them"):
        SFTConfig(init=INIT, model="x/y")
    with pytest.raises(ConfigError, match="steps: got 0"):
        SFTConfig(steps=0)
    assert SFTConfig().resolved().lr == 1e-5
    assert SFTConfig(lora=LoraConfig()).resolved().lr == 1e-4
    assert SFTConfig(init=INIT).resolved().lr == 2e-3
    assert SFTConfig(optimizer=OptimizerConfig(lr=1.0)).resolved().lr == 1.0
