"""Real chat templates (from the trl package) with small tokenizers that know their control tokens."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CONTROL = re.compile(
    r"<\|[\w/▁ ]+?\|>|<｜[\w▁]+?｜>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|<end_of_utterance>|<turn\|>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>|<\|\"\|>"
)
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that are ordinary text to the tokenizer (`special=False`), as in Qwen3."""
EOS = {
    "gemma": "<end_of_turn>", "gemma4": "<turn|>", "diffusion_gemma": "<turn|>", "gptoss": "<|return|>", "glm4moe": "<|endoftext|>",
    "cohere": "<|END_OF_TURN_TOKEN|>", "llava": "</s>", "muse": "<|eot|>", "deepseek": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>", "phi3": "<|endoftext|>",
    "llava": "<|im_end|>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>",
}  # fmt: skip
"""EOS token by the longest matching prefix of the template's name; `<|im_end|>` for all others."""
GENERATION = {
    "gemma4": ("<turn|>", "<|tool_response>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gptoss": ("<|return|>", "<|call|>"),
}
"""Stop tokens that such a model's generation_config.json names."""


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def of_family(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((table[key] for key in sorted(table, key=len, reverse=True) if name.startswith(key)), default)


@cache
def merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE trained on prose, code and digits."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([(FOLDER / "README.md").read_text("utf-8"), source("qwen3"), "\n\n \n\n\n"] * 3, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def tokenizer(
    template: str, eos: str = "<|im_end|>", *, folder: Path | None = None, stops: tuple[str, ...] = (), **kwargs: Any
) -> Any:
    """A fast tokenizer with `template`, whose control tokens are those that the template spells out."""
    from transformers import PreTrainedTokenizerFast

    vocab, pairs = merges()
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    control = sorted({eos, "<|endoftext|>", "<|bos|>", *CONTROL.findall(template)} - set(PLAIN))
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, bos_token="<|bos|>", chat_template=template, **kwargs
    )
    if folder is not None:
        made.save_pretrained(folder)
        ids = [made.convert_tokens_to_ids(text) for text in stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        made.name_or_path = str(folder)
    return made


def of_template(name: str, folder: Path) -> Any:
    """The tokenizer of one of `NAMES`, saved in `folder` with a generation_config.json where the family has one."""
    stops = of_family(GENERATION, name, ())
    return tokenizer(source(name), of_family(EOS, name, "<|im_end|>"), folder=folder if stops else None, stops=stops)
