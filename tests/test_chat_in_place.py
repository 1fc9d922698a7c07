"""A reply's ids are those that it has where it stands, whatever a tokenizer puts in front of a text by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import templates as t
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm_gym.chat import Chat
from llm_gym.core import Sampling
from llm_gym.policies.scripted import ScriptedPolicy

CONTROL = ("<|im_start|>", "<|im_end|>", "<|assistant|>")
FRAME = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPTS = {
    "newline": FRAME + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "two newlines": FRAME + "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "control token": FRAME + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "colon": FRAME + "{% if add_generation_prompt %}Assistant:{% endif %}",
    "space": FRAME + "{% if add_generation_prompt %}Assistant: {% endif %}",
    "word": FRAME + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
}
"""What stands in front of a reply."""
KINDS = {
    "metaspace first": (None, pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()),
    "metaspace always": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()),
    "prepended": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ),
    "no prefix": (
        normalizers.Replace(" ", "▁"),
        None,
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
    ),
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "bytes with prefix": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
}
"""Normalizer, pre-tokenizer and decoder of the families of tokenizers: Mistral, T5, Llama 2, Gemma, GPT-2, RoBERTa."""
texts = st.text(st.sampled_from("\n :.<|Thea a1é"), max_size=12)


@cache
def merges(of_bytes: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    bpe = Tokenizer(models.BPE())
    alphabet = (
        pre_tokenizers.ByteLevel.alphabet() if of_bytes else list("\n" + "".join(map(chr, range(33, 127))) + "é▁")
    )
    bpe.pre_tokenizer = KINDS["bytes" if of_bytes else "metaspace always"][1]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    prose = [(t.FOLDER / "README.md").read_text("utf-8"), "\n\n \n\n\n : :: The the a: .\n" * 60]
    bpe.train_from_iterator(prose, trainer)
    model = t.json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@cache
def chat_for(kind: str, prompt: str) -> Chat:
    from transformers import PreTrainedTokenizerFast

    vocab, pairs = merges(kind.startswith("bytes"))
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    normalizer, splitter, made.decoder = KINDS[kind]
    if normalizer is not None:
        made.normalizer = normalizer
    if splitter is not None:
        made.pre_tokenizer = splitter
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return Chat(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=PROMPTS[prompt]))


def assert_in_place(chat: Chat, context: list[int], rendered: str, text: str) -> bool:
    """The reply's ids are the rest of the whole text's, or where those have no border there, ids that read the same."""
    reply = chat.encode_reply(text).tolist()
    assert reply[-1] == chat.stop_ids[0]
    whole = chat.tokenizer.encode(rendered + text, add_special_tokens=False)
    border = whole[: len(context)] == context
    if border:
        assert reply[:-1] == whole[len(context) :]
    else:
        decode = chat.tokenizer.decode
        assert decode(context + reply[:-1]) == decode(context) + text
    return border


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=texts)
def test_a_reply_has_the_ids_that_it_has_in_place(kind: str, prompt: str, text: str) -> None:
    chat = chat_for(kind, prompt)
    context = chat.open([t.user("q")]).tolist()
    rendered = chat.tokenizer.apply_chat_template([t.user("q")], add_generation_prompt=True, tokenize=False)
    assert_in_place(chat, context, rendered, text)


@pytest.mark.parametrize("kind", ["metaspace first", "metaspace always", "prepended", "bytes with prefix"])
def test_no_space_is_put_in_front_of_a_reply(kind: str) -> None:
    chat = chat_for(kind, "newline")
    words = chat.tokenizer.convert_ids_to_tokens(chat.encode_reply("The").tolist())
    assert words[0][0] not in "▁Ġ", words
    spoken = ScriptedPolicy(["The"], chat).generate([chat.open([t.user("q")])], Sampling())[0].tokens
    assert spoken.tolist() == chat.encode_reply("The").tolist()


@pytest.mark.parametrize(("prompt", "text"), [("space", "The"), ("newline", "\n\nThe")])
def test_a_text_that_would_merge_with_the_prompt_is_encoded_behind_it(prompt: str, text: str) -> None:
    """A context is not tokenised again, so the ids are those that can be sampled behind it."""
    chat = chat_for("bytes", prompt)
    context = chat.open([t.user("q")]).tolist()
    rendered = chat.tokenizer.apply_chat_template([t.user("q")], add_generation_prompt=True, tokenize=False)
    assert not assert_in_place(chat, context, rendered, text), "meant to merge"


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_control_token_gets_no_space_inside(kind: str) -> None:
    """A control token spelled out by a user is encoded in pieces; a piece by itself would get a space in front."""
    chat = chat_for(kind, "newline")
    said = "a<|im_end|>b"
    ids = chat.open([t.user(said)])
    assert said in chat.tokenizer.decode(ids)
    assert ids.tolist().count(chat.stop_ids[0]) == 1


def test_the_context_decides_what_stands_in_front() -> None:
    chat: Any = chat_for("metaspace always", "newline")
    behind_text = chat.encode_reply("The", chat.tokenizer.encode("<|im_start|>x", add_special_tokens=False)).tolist()
    behind_token = chat.encode_reply("The", chat.tokenizer.encode("<|assistant|>", add_special_tokens=False)).tolist()
    assert behind_text == chat.encode_reply("The").tolist()
    assert chat.tokenizer.convert_ids_to_tokens(behind_text)[0][0] == "T"
    assert chat.tokenizer.convert_ids_to_tokens(behind_token)[0][0] == "▁", "as it stands in the whole text"
