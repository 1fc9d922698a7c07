"""Loading a tokenizer, and text to ids without surprises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import templates as t
from hypothesis import given
from hypothesis import strategies as st

from llm_gym import embedded
from llm_gym.errors import SettingError
from llm_gym.tokenizer import SPLIT, Coder, declared_stops, load_tokenizer, well_formed


def test_none_path_and_text_give_one_shared_tokenizer() -> None:
    assert load_tokenizer() is load_tokenizer(embedded.PATH) is load_tokenizer(str(embedded.PATH))
    made = t.tokenizer(None)
    assert load_tokenizer(made) is made


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "~/nowhere/at/all", "runs/a/checkpoint"])
def test_a_missing_folder_is_named(source: str) -> None:
    with pytest.raises(SettingError, match=rf"^tokenizer: got '{source}', but there is no such folder; pass a folder"):
        load_tokenizer(source)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(SettingError, match=r"^tokenizer: got .*which cannot be loaded \(.+\); pass a folder"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_loads_equal(tmp_path: Path) -> None:
    made = t.tokenizer(t.source("qwen3"))
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "<|im_start|>user\nHow much is 3 * 4?<|im_end|>\n"
    assert loaded.encode(text, add_special_tokens=False) == made.encode(text, add_special_tokens=False)
    assert loaded.chat_template == made.chat_template


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "GemmaTokenizer", "Qwen2Tokenizer"])
def test_the_file_is_loaded_as_it_is_whatever_class_is_named(named: str, tmp_path: Path) -> None:
    """A class may have rules of its own: under Llama's, a byte-level file such as DeepSeek's loses its spaces."""
    made = t.tokenizer(t.source("qwen3"))
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": named}))
    loaded, text = load_tokenizer(tmp_path), "The cat sat on 1234  mats.\n\n"
    assert loaded.encode(text, add_special_tokens=False) == made.encode(text, add_special_tokens=False)
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert (loaded.eos_token, loaded.chat_template) == (made.eos_token, made.chat_template)


def test_special_tokens_may_be_left_to_the_class(tmp_path: Path) -> None:
    """GPT-2's folder names no EOS token; its class knows it."""
    t.tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer(tmp_path).eos_token == "<|endoftext|>"


def test_neither_import_nor_the_embedded_tokenizer_pulls_in_torch() -> None:
    code = """
import sys
import llm_gym.chat
assert not {"transformers", "torch"} & set(sys.modules)
llm_gym.chat.load_chat().open([{"role": "user", "content": "1 + 1"}])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(embedded.PATH).parents[1], timeout=300)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ["<|im_end|>"]),
        ({}, ["<|im_end|>"]),
        ({"eos_token_id": "<|endoftext|>"}, ["<|endoftext|>"]),
        ({"eos_token_id": ["<|endoftext|>", "<|im_end|>"]}, ["<|endoftext|>", "<|im_end|>"]),
        ({"eos_token_id": ["<|im_end|>", 10**6]}, ["<|im_end|>"]),
    ],
    ids=repr,
)
def test_stops_come_from_the_generation_config(config: dict | None, expected: list[str], tmp_path: Path) -> None:
    made = t.tokenizer(None)
    made.name_or_path = str(tmp_path)
    if config is not None:
        text = json.dumps(config)
        for token in ("<|endoftext|>", "<|im_end|>"):
            text = text.replace(json.dumps(token), str(made.convert_tokens_to_ids(token)))
        (tmp_path / "generation_config.json").write_text(text)
    assert list(declared_stops(made).values()) == expected


def test_a_hub_models_generation_config_is_found_in_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    made = t.tokenizer(None)
    made.name_or_path = "org/model"
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    for path, text in (
        (
            snapshot / "generation_config.json",
            json.dumps({"eos_token_id": made.convert_tokens_to_ids("<|endoftext|>")}),
        ),
        (snapshot.parents[1] / "refs" / "main", "abc"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert list(declared_stops(made).values()) == ["<|endoftext|>"]
    made.name_or_path = "no hub id at all"
    assert list(declared_stops(made).values()) == ["<|im_end|>"]


def test_a_callers_truncation_and_padding_do_not_leak() -> None:
    made = t.tokenizer(None)
    made.backend_tokenizer.enable_truncation(3)
    made.backend_tokenizer.enable_padding(length=50)
    coder = Coder(made)
    ids = coder.encode("one two three four five six")
    made.backend_tokenizer.enable_truncation(2)
    assert coder.decode(ids) == "one two three four five six"
    assert coder.encode("one two three four five six") == ids


def test_tokens_that_a_caller_adds_later_do_not_leak() -> None:
    made = t.tokenizer(None)
    coder = Coder(made)
    before = coder.encode("one <|late|> two")
    made.add_special_tokens({"extra_special_tokens": ["<|late|>"]})
    assert coder.encode("one <|late|> two") == before
    assert len(Coder(made).encode("one <|late|> two")) < len(before)


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|>", "x", " "]), max_size=8).map("".join))
def test_broken_control_tokens_are_text_that_decodes_to_itself(text: str) -> None:
    ids = CODER.encode(CODER.tidy(text, trusted=False))
    assert not set(ids) & set(MADE.added_tokens_decoder)
    assert CODER.decode(ids) == text


def test_overlapping_control_tokens_are_all_broken() -> None:
    made = t.tokenizer(None, control=("<a>", "><b", "<b>", "a><"))
    coder = Coder(made)
    ids = coder.encode(coder.tidy("<a><b><a>", trusted=False))
    assert not set(ids) & set(made.added_tokens_decoder)
    assert coder.decode(ids) == "<a><b><a>"


def test_trees_are_tidied_and_trusted_text_keeps_its_control_tokens() -> None:
    tree = {"content": [{"type": "text", "text": "a<|im_end|>"}, None, 3], "name": "\ud800"}
    tidy = CODER.tidy(tree, trusted=False)
    assert tidy == {"content": [{"type": "text", "text": f"a<{SPLIT}|im_end|>"}, None, 3], "name": "\ufffd"}
    assert CODER.tidy("a<|im_end|>", trusted=True) == "a<|im_end|>"


@given(st.text(st.characters(), max_size=20))
def test_any_python_string_can_be_encoded(text: str) -> None:
    assert CODER.decode(CODER.encode(CODER.tidy(text, trusted=False))) == well_formed(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("\ud83d\ude42", "🙂"), ("é🙂", "é🙂")]
)
def test_surrogates_are_joined_or_replaced(text: str, expected: str) -> None:
    assert well_formed(text) == expected


def test_ids_out_of_range_are_left_out() -> None:
    ids = CODER.encode("abc")
    assert CODER.decode([-1, *ids, CODER.vocab_size, 2**31 - 1, 2**40]) == "abc"


MADE = t.tokenizer(None)
CODER = Coder(MADE)
