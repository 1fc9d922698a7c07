"""Real tokenizers and their chat templates: every environment conforms, and contexts grow exactly."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import real_tokenizers as real
import templates as t
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_gym.chat import Chat, load_chat
from llm_gym.envs import TABLE
from llm_gym.harness.data.sft_examples import encode
from llm_gym.testing import check_environment
from llm_gym.tokenizer import load_tokenizer

SENTENCEPIECE = {"llama2 chatml": real.CHATML, "llama2 inst": real.INST}
NAMES = [*real.NAMES, *SENTENCEPIECE]
texts = st.text(st.sampled_from("aZ 09\n\t.,<|>/{}\"'\\é日🙂▁#_=") | st.characters(codec="utf-8"), max_size=30).map(
    lambda text: unicodedata.normalize("NFC", text)
)
few = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@cache
def tokenizer(name: str) -> Any:
    return real.llama2(SENTENCEPIECE[name]) if name in SENTENCEPIECE else load_tokenizer(real.folder(name))


@cache
def chat_for(name: str) -> Chat:
    return load_chat(tokenizer(name))


def ids_of(name: str, text: str) -> list[int]:
    return tokenizer(name).encode(text, add_special_tokens=False)


def render(name: str, *messages: dict[str, Any], prompt: bool = True) -> str:
    return tokenizer(name).apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", NAMES)
@few
@given(question=texts)
def test_a_context_is_what_transformers_makes_of_it(name: str, question: str) -> None:
    ids = chat_for(name).open([t.user(question)]).tolist()
    assert ids == t.full_render(chat_for(name), [t.user(question)])
    bos = tokenizer(name).bos_token_id
    assert bos is None or ids.count(bos) == (bos in ids[:1])


@pytest.mark.parametrize("name", NAMES)
@few
@given(question=texts, more=texts)
def test_an_extension_is_the_end_of_the_whole(name: str, question: str, more: str) -> None:
    chat = chat_for(name)
    cut = chat.extend([], [t.user(more)]).tolist()
    assert t.full_render(chat, [t.user(question), t.assistant("Yes."), t.user(more)])[-len(cut) :] == cut
    assert chat.extend(chat.encode_reply("Yes."), [t.user(more)]).tolist() == cut[1:]


@pytest.mark.parametrize("name", NAMES)
@few
@given(question=texts, reply=texts)
def test_a_reply_has_the_ids_that_it_has_in_place(name: str, question: str, reply: str) -> None:
    chat = chat_for(name)
    context = chat.open([t.user(question)]).tolist()
    ids = chat.encode_reply(reply, context).tolist()
    whole = ids_of(name, render(name, t.user(question)) + reply)
    if whole[: len(context)] == context:
        assert ids == [*whole[len(context) :], chat.stop_ids[0]]
    decode = chat.tokenizer.backend_tokenizer.decode
    assert decode(context + ids[:-1], skip_special_tokens=False).endswith(reply)
    assert chat.text(ids) == (reply if name not in SENTENCEPIECE else chat.text(ids[:-1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_word_gets_no_space(name: str) -> None:
    chat = chat_for(name)
    first = chat.tokenizer.convert_ids_to_tokens(int(chat.encode_reply("The end.")[0]))
    assert first == "The"


@pytest.mark.parametrize("name", NAMES)
@few
@given(question=texts, reply=texts)
def test_a_training_row_is_what_transformers_renders(name: str, question: str, reply: str) -> None:
    messages = [t.user(question), t.assistant(reply + ".")]
    row = encode({"messages": messages}, tokenizer(name))
    whole = ids_of(name, render(name, *messages, prompt=False))
    start = chat_for(name).open(messages[:1]).tolist()
    if whole[: len(start)] == start:
        assert whole[: len(row.tokens)] == row.tokens.tolist()
    assert row.tokens[-1] == chat_for(name).stop_ids[0]


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.data())
def test_control_tokens_in_text_stay_text(name: str, data: Any) -> None:
    chat = chat_for(name)
    special = {i: str(token) for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    spelled = "a" + "".join(data.draw(st.lists(texts | st.sampled_from(sorted(special.values())), max_size=5))) + "z"
    for made in (lambda said: chat.open([t.user(said)]), lambda said: chat.extend([], [t.user(said)])):
        assert [i for i in made(spelled).tolist() if i in special] == [i for i in made("a").tolist() if i in special]
        assert spelled in chat.tokenizer.decode(made(spelled))


@pytest.mark.parametrize("name", real.NAMES)
def test_tools_may_have_properties_without_a_type(name: str) -> None:
    given, got = t.calls_without_types(tokenizer(name))
    assert got == given


@pytest.mark.parametrize("name", real.NAMES)
def test_stop_tokens_are_the_models(name: str) -> None:
    chat = chat_for(name)
    stops = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))
    assert dict(zip(chat.stop_ids, stops, strict=True)) == real.STOPS[name]
    assert stops[0] in render(name, t.user("a"), t.assistant("b"), prompt=False)[-20:]


SIZES = {"qwen3": 151669, "llama3_1": 128256, "gemma3": 262145, "deepseek_v3": 128815}
"""One more than the largest id; the models' heads are padded beyond."""


@pytest.mark.parametrize("name", real.NAMES)
def test_ids_of_a_padded_head_are_left_out(name: str) -> None:
    chat = chat_for(name)
    assert chat.vocab_size == SIZES[name]
    assert chat.text([*chat.encode_reply("Four.")[:-1], chat.vocab_size, chat.vocab_size + 100]) == "Four."


@pytest.mark.parametrize("name", real.NAMES)
def test_words_keep_their_spaces(name: str) -> None:
    """Whatever class is named beside the file: Llama's has rules of its own, under which DeepSeek's lose them."""
    text = "The cat\n\n  sat on 1234 mats, isn't it?  <|x|> 日本é"
    assert tokenizer(name).decode(ids_of(name, text), clean_up_tokenization_spaces=False) == text
    assert len(ids_of(name, text)) < len(text) * 0.7


@pytest.mark.parametrize("env", [name for name, (entry, _) in TABLE.items() if ".adapters." not in entry])
@pytest.mark.parametrize("name", real.NAMES)
def test_every_environment_conforms(name: str, env: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"tokenizer": str(real.folder(name))}
    if env in ("GSM8K-v0", "Dataset-v0"):
        rows = [{"question": f"{i} + {i}?", "prompt": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(20)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kwargs["dataset"] = str(tmp_path / "rows.jsonl")
    if env == "Gymnasium-v0":
        kwargs["max_turns"] = 6  # or as many as the context holds
    check_environment(env, **kwargs)
