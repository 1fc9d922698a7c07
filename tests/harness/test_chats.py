"""Rows of data as chats, and chats as the ids that an episode would have shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small_models import stretches

sys.path.insert(0, str(Path(__file__).parents[1]))
import templates as t

from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import open_thinking
from llm_gym.errors import DataError
from llm_gym.harness.data.sft_examples import encode, encode_all, load_examples

TOOL = t.PYTHON
ASK = {"role": "user", "content": "7*8?"}
SAY = {"role": "assistant", "content": "56"}


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, examples: list[dict]) -> str:
    path.write_text("".join(json.dumps(e) + "\n" for e in examples))
    return str(path)


def trained_texts(row, tokenizer) -> list[str]:
    return [tokenizer.decode(row.tokens[a:b]) for a, b in stretches(row)]


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
    assert "nobody" not in tokenizer.decode(row.tokens)
    for needed in ("Be brief.", "2+2?", "So?"):
        assert needed in tokenizer.decode(np.delete(row.tokens, row.trained))


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.0, "train": True}])
def test_a_flagged_reply_is_context_only(flag: dict) -> None:
    tokenizer = load_tokenizer()
    turns = [ASK, {**SAY, "content": "54"} | flag, {"role": "user", "content": "Sure?"}, SAY]
    row, plain = (
        encode({"messages": m}, tokenizer) for m in (turns, [*turns[:1], {**SAY, "content": "54"}, *turns[2:]])
    )
    np.testing.assert_array_equal(row.tokens, plain.tokens)
    stop = tokenizer.decode([load_chat(tokenizer).stop_ids[0]])
    assert trained_texts(row, tokenizer) == ["56" + stop]
    assert trained_texts(plain, tokenizer) == ["54" + stop, "56" + stop]
    after = encode({"messages": [ASK, SAY, {"role": "user", "content": "Sure?"}, SAY | flag]}, tokenizer)
    assert trained_texts(after, tokenizer) == ["56" + stop]
    assert "Sure" not in tokenizer.decode(after.tokens)


def test_the_ids_are_those_of_an_episode() -> None:
    """Open, reply, extend: what an environment shows and a policy samples; structured or spelled out."""
    tokenizer = load_tokenizer()
    chat = load_chat(tokenizer, [TOOL])
    tool = {"role": "tool", "content": "56"}
    call = '<tool_call>\n{"name": "python", "arguments": {"code": "7*8"}}\n</tool_call>'
    structured = {"role": "assistant", "tool_calls": [{"function": {"name": "python", "arguments": {"code": "7*8"}}}]}
    first, second = chat.encode_reply(call), chat.encode_reply("56")
    want = np.concatenate([chat.open([ASK]), first, chat.extend(first, [tool]), second])
    for reply in ({"role": "assistant", "content": call}, structured):
        messages = [ASK, reply, tool, SAY]
        row = encode({"messages": messages, "tools": [TOOL]}, tokenizer)
        np.testing.assert_array_equal(row.tokens, want)
        assert len(row.trained) == len(first) + len(second)
    assert not np.array_equal(row.tokens[:8], encode({"messages": [ASK, SAY]}, tokenizer).tokens[:8])


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "llama3_1", "gptoss", "gemma4", "lfm2_v2", "qwen3_6"])
@pytest.mark.parametrize("style", ["dict", "json"])
def test_structured_calls_read_back_from_the_trained_ids(name: str, style: str, tmp_path: Path) -> None:
    tokenizer = t.made_for(name, tmp_path)
    tool_chat = load_chat(tokenizer, [TOOL])
    code = 'print("a\\n<b>", {1: 2})\nx = 1'
    messages = [ASK, t.calling([code], style), *t.results(["56"]), SAY]
    row = encode({"messages": messages, "tools": [TOOL]}, tokenizer)
    (a, b), (c, d) = stretches(row)
    assert row.tokens[b - 1] in tool_chat.stop_ids
    schemas = {"python": TOOL["function"]["parameters"]}
    closing = open_thinking(tool_chat.text(row.tokens[:a]))
    (found,) = formats.read(formats.detect(tool_chat), tool_chat.text(row.tokens[a:b]), closing, schemas)
    assert (found.name, found.arguments, found.error) == ("python", {"code": code}, "")
    np.testing.assert_array_equal(row.tokens[:a], tool_chat.open([ASK]))
    np.testing.assert_array_equal(row.tokens[b:c], tool_chat.extend(row.tokens[a:b], t.results(["56"])))
    assert tool_chat.text(row.tokens[c:d]).endswith("56")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([ASK], "an assistant message"),
        ([SAY], "a prompt and then"),
        ([ASK, {**SAY, "train": False}], "none is trained"),
        ([{**ASK, "train": True}, SAY], "only the assistant's"),
        ([ASK, {**SAY, "weight": 0.5}], "weight is 0.5"),
        ([ASK, {**SAY, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}], "has no tools"),
        ([ASK, {**SAY, "tool_calls": [{"function": {"arguments": {}}}]}], "a name and arguments"),
    ],
)
def test_chats_that_train_nothing_are_refused(messages: list[dict], match: str) -> None:
    with pytest.raises(DataError, match=match):
        encode({"messages": messages}, load_tokenizer())
    with pytest.raises(DataError, match=f"row 1 of the examples: .*{match}"):
        encode_all([chat("a", "b"), {"messages": messages}], load_tokenizer(), max_length=99)


def test_calls_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    """In a block of Python, which is how code is called where a template has no tools: code with a line of ```."""
    tokenizer = t.made_for(next(name for name in sorted(t.NO_TOOL_TURN)), tmp_path)
    function = TOOL["function"]
    tool = {**TOOL, "function": {**function, "parameters": {**function["parameters"], "required": ["code"]}}}
    assert encode({"messages": [ASK, t.calling(["1"])], "tools": [tool]}, tokenizer).trained.size
    with pytest.raises(DataError, match="chat template"):
        encode({"messages": [ASK, t.calling(["1\n```\n2"])], "tools": [tool]}, tokenizer)


PAIR = (("user", "a"), ("assistant", "b"))
FORMS = {
    "messages": [chat("a", "b")],
    "conversation": [{"conversation": chat("a", "b")["messages"]}],
    "text": [{"messages": json.dumps(chat("a", "b")["messages"])}],
    "prompt": [{"prompt": "a", "completion": "b"}],
    "lists": [{"prompt": chat("a", "b")["messages"][:1], "completion": chat("a", "b")["messages"][1:]}],
    "question": [{"question": "a", "answer": "b", "level": 3}],
    "parts": [{"messages": [{"role": r, "content": [{"type": "text", "text": x}]} for r, x in PAIR]}],
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_are_the_same_chat(form: str, tmp_path: Path) -> None:
    rows = FORMS[form]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        (example,) = load_examples(str(tmp_path / f"a.{suffix}"))
        assert example == {**chat("a", "b"), "tools": None}, suffix


def test_unusual_columns_are_named_and_a_system_prompt_goes_first(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": "a", "a": "b", "messages": "none"}])
    (example,) = load_examples(file, columns={"prompt": "q", "completion": "a"}, system_prompt="Be brief.")
    assert example["messages"] == [{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"]]


def test_a_column_may_begin_below_the_first_row(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": chat, "tools": tools}])
    assert [example["tools"] for example in load_examples(file)] == [None, tools]


def test_what_a_table_fills_in_is_left_out(tmp_path: Path) -> None:
    """Arrow gives every object the keys of all, null where there was none."""
    calls = [
        {"type": "function", "function": {"name": n, "arguments": a}} for n, a in (("f", {"x": 1}), ("g", {"y": 2}))
    ]
    rows = [{"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = load_examples(str(tmp_path / "a.parquet"))
    assert [e["messages"][0] for e in found] == [ASK, ASK]
    assert [e["messages"][1]["tool_calls"][0]["function"]["arguments"] for e in found] == [{"x": 1}, {"y": 2}]


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        ([{"text": "a"}], {}, r"no column for 'prompt' \(columns: text\)"),
        ([{"question": "a"}], {}, "no column for 'completion'"),
        ([chat("a", "b")], {"message": "x"}, "did you mean 'messages'"),
        (
            [chat("a", "b")],
            {"messages": "mesages"},
            "columns.messages: unknown value 'mesages'; did you mean 'messages'",
        ),
        ([chat("a", "b"), {"messages": []}], {}, "row 1 of .*'messages' holds"),
        ([chat("a", "b"), {"mesages": []}], {}, "row 1 of .*'messages' holds None"),
        ([{"prompt": "a", "completion": 3}], {}, "row 0 of .*'completion' holds 3"),
        ([chat("a", "b"), chat("a", None)], {}, "row 1 of .*'assistant' has no content"),
        ([chat("a", "b"), chat({"x": 1}, "b")], {}, "row 1 of .*user's content is"),
        ([chat("a", "b") | {"tools": 3}], {}, "row 0 of .*'tools' holds 3"),
    ],
)
def test_bad_rows_are_one_sentence_with_their_number(rows, columns, match, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load_examples(write(tmp_path / "a.jsonl", rows), columns=columns)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        load_examples(str(tmp_path / "none.jsonl"))
    (tmp_path / "c.jsonl").write_text("\n{oops\n")
    with pytest.raises(DataError, match=r"line 2 is not JSON"):
        load_examples(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        load_examples(str(tmp_path / "d.jsonl"))


def test_long_chats_are_dropped_or_cut() -> None:
    tokenizer = load_tokenizer()
    short, long, buried = chat("a", "b"), chat("a", "b c " * 30), chat("a " * 60, "b")
    limit = len(encode(short, tokenizer).tokens) + 5
    rows, counts = encode_all([short, long, buried], tokenizer, max_length=limit)
    assert (len(rows), counts) == (1, {"dropped": 2, "cut": 0})
    rows, counts = encode_all([short, long, buried], tokenizer, max_length=limit, cut=True)
    assert (len(rows), counts) == (2, {"dropped": 1, "cut": 1})
    whole = encode(long, tokenizer)
    np.testing.assert_array_equal(rows[1].tokens, whole.tokens[:limit])
    np.testing.assert_array_equal(rows[1].trained, whole.trained[whole.trained < limit])
