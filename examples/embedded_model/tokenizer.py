"""The tokenizer: byte-level BPE in which every digit is a token of its own, and the chat template around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 576
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
"""Single tokens, but not special: decoding a reply for its tool calls must show them."""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of exactly `VOCABULARY` tokens, trained on rendered chats and plain English.

    Digits are split off first, so that no merge ever spans one: arithmetic then sees the same ten symbols
    everywhere, and a number's length is its digit count. All 256 bytes are in the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False) for token in CONTROL + MARKUP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    markup = re.compile("|".join(map(re.escape, CONTROL + MARKUP)))
    tokenizer.train_from_iterator((part for text in texts for part in markup.split(text)), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"vocabulary: want {VOCABULARY} tokens, got {tokenizer.get_vocab_size()}; add text.")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, template: str, out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, in the Hugging Face layout."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    out.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(template)
