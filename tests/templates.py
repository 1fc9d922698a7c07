"""Real chat templates (those of the trl package) with small tokenizers that know their control tokens."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations))) / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CONTROL = re.compile(
    r"<\|[\w/ ]+?\|>|<｜[\w▁]+?｜>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|\[/?INST\]|\[gMASK\]|<sop>|</s>|<\|\"\|>"
)
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that are ordinary text to the tokenizer (`special=False`), as in Qwen3."""
EOS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<eos>",
    "gemma4": "<turn|>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|endoftext|>",
    "smolvlm": "<end_of_utterance>",
}
"""EOS token by the beginning of a template's name; `<|im_end|>` for all others."""
GENERATION = {
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
}
"""Stop tokens in such a model's generation_config.json."""


def ordinary(text: str) -> bool:
    """Whether no control token is in a text: a chat encodes those as ordinary text, and transformers does not.

    Hypothesis draws constants of all test files that are loaded, such as `<|im_end|>`.
    """
    return CONTROL.search(text) is None and "<s>" not in text


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def made_for(name: str, folder: Path) -> Any:
    """The tokenizer of one of `NAMES`; `folder` takes its generation_config.json where the family has one."""
    made = tokenizer(source(name), _of_family(EOS, name, "<|im_end|>"))
    if stops := _of_family(GENERATION, name, ()):
        config = {"eos_token_id": made.convert_tokens_to_ids(list(stops))}
        (folder / "generation_config.json").write_text(json.dumps(config))
        made.name_or_path = str(folder)
    return made


def tokenizer(template: str | None, eos: str = "<|im_end|>", control: tuple[str, ...] = (), **settings: Any) -> Any:
    """A byte-level tokenizer with `template`; its control tokens are `control` and all that the template spells."""
    from transformers import PreTrainedTokenizerFast

    vocab, pairs = _bpe()
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = sorted({eos, "<|endoftext|>", "<|bos|>", *control, *CONTROL.findall(template or "")} - set(PLAIN))
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, bos_token="<|bos|>", chat_template=template, **settings
    )


@cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges trained on prose, code and runs of newlines."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([(FOLDER / "README.md").read_text("utf-8"), source("qwen3"), "\n\n \n\n\n" * 50], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _of_family(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((table[key] for key in sorted(table, key=len, reverse=True) if name.startswith(key)), default)


PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string", "description": "The code."}}},
    },
}
"""A tool schema."""
TYPELESS: dict[str, Any] = {
    "empty": {},
    "described": {"description": "Anything."},
    "anything": True,
    "either": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    "one": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    "all": {"allOf": [{"type": "string"}]},
    "several": {"type": ["string", "null"]},
    "chosen": {"enum": ["a b", "c"]},
    "fixed": {"const": "a b"},
    "many": {"type": "array"},
    "whatever": {"type": "array", "items": {}},
}
"""Properties without a `type` of their own or of their items, as MCP servers have them; each takes "a b" or ["a b"]."""
NO_TOOL_TURN = {
    name for name in NAMES if name.startswith(("cohere", "gemma", "llava_next", "phi3")) and "gemma4" not in name
}
"""Templates that drop or refuse tool results."""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calling(codes: list[str], form: str = "dict") -> dict[str, Any]:
    """A reply that calls the tool once per code; arguments as a dict or, for DeepSeek, as JSON."""
    arguments = [{"code": code} if form == "dict" else json.dumps({"code": code}) for code in codes]
    calls = [
        {"id": f"callno{i:03d}", "type": "function", "function": {"name": "python", "arguments": value}}
        for i, value in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def results(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "name": "python", "tool_call_id": f"callno{i:03d}", "content": text}
        for i, text in enumerate(texts)
    ]


def full_render(chat: Any, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of the whole chat, the reference that extensions must be the end of."""
    from llm_gym.chat import DATE

    if chat.reads_parts:
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
            for m in messages
        ]
    return chat.tokenizer.apply_chat_template(
        messages, tools=chat.tools, add_generation_prompt=True, return_dict=False, strftime_now=DATE.strftime
    )


def calls_without_types(tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tool with each of `TYPELESS` is called with, and what it gets, on a tokenizer's template."""
    from llm_gym.env import Reply
    from llm_gym.envs.tools import ToolEnv
    from llm_gym.envs.tools.parsers.calls import open_thinking
    from llm_gym.envs.tools.schema import Tool

    got: dict[str, Any] = {}
    parameters = {"properties": TYPELESS, "required": list(TYPELESS)}
    schemas = [{"name": "look_up", "parameters": parameters}, {"name": "nothing"}, {"name": "bare", "parameters": {}}]
    tools = [
        Tool({"type": "function", "function": schema}, lambda **arguments: got.update(arguments)) for schema in schemas
    ]

    class Library(ToolEnv):
        def open(self) -> list[dict[str, Any]]:
            return [user("Go.")]

        def final(self, text: str) -> Reply:
            return Reply(done=True)

    env = Library(tools, tokenizer=tokenizer, max_context=100_000, max_tokens=10_000)
    context, _ = env.reset(seed=0)
    given = {name: ["a b"] if name in ("many", "whatever") else "a b" for name in TYPELESS}
    env.step(env.chat.encode_reply(open_thinking(env.chat.text(context)) + env.call_text("look_up", **given)))
    env.close()
    return given, got
