"""The shipped model's files: small, complete offline, exact in its chat format, and no better than promised."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym import embedded
from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.envs.arithmetic import Problem, split_of

MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code and returns what it prints.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(1234*567)"}}\n</tool_call>'
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1234 * 567?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "python", "arguments": {"code": "print(1234*567)"}}},
        ],
    },
    {"role": "tool", "content": "699678"},
    {"role": "assistant", "content": "Answer: 699678"},
]


@cache
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded.PATH, dtype="float32", local_files_only=True).eval()


@cache
def unseen() -> list[Problem]:
    """Every two-digit sum of the test split."""
    every = (Problem(a, "+", b) for a in range(10, 100) for b in range(10, 100))
    return [problem for problem in every if split_of(problem) == "test"]


def unseen_large(count: int) -> list[Problem]:
    """Problems of the test split with three to five digits."""
    drawn = np.random.default_rng(0).integers([100, 0, 100], [100_000, 3, 10_000], (20 * count, 3)).tolist()
    every = [Problem(a, "+-*"[op], b) for a, op, b in drawn]
    return [problem for problem in every if split_of(problem) == "test"][:count]


def render(messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> str:
    text: str = load_tokenizer().apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    return text


def replies(contexts: list[np.ndarray], start: str = "") -> list[str]:
    """Greedy completions by plain transformers, of contexts of any length, each followed by `start`."""
    import torch

    chat, lengths = load_chat(), {len(c) for c in contexts}
    begun = chat.encode_reply(start)[:-1]
    said = dict.fromkeys(range(len(contexts)), "")
    for length in lengths:  # no padding
        rows = [i for i, c in enumerate(contexts) if len(c) == length]
        ids = torch.from_numpy(np.stack([np.concatenate([contexts[i], begun]) for i in rows]).astype(np.int64))
        out = model().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
        for i, row in zip(rows, out[:, length:].tolist(), strict=True):
            said[i] = chat.text(row[: row.index(chat.stop_ids[0]) + 1] if chat.stop_ids[0] in row else row)
    return list(said.values())


def test_the_files_are_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in embedded.PATH.iterdir() if path.is_file()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"chat_template.jinja"} <= files.keys()
    assert files["model.safetensors"] <= 4e6
    assert sum(files.values()) <= 4.2e6


def test_the_model_is_a_tied_qwen3_with_one_row_per_token() -> None:
    config = model().config
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.tie_word_embeddings
    assert config.vocab_size == len(load_tokenizer()) == model().get_input_embeddings().weight.shape[0]
    stored = json.loads((embedded.PATH / "config.json").read_text())["dtype"]
    assert stored == "bfloat16"
    stop = load_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert config.eos_token_id == model().generation_config.eos_token_id == load_tokenizer().eos_token_id == stop


@given(st.text())
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(st.from_regex(r"[-+*=., ()a-z]*[0-9]{1,12}[-+*=., ()a-z]*", fullmatch=True))
def test_every_digit_is_a_token_of_its_own(text: str) -> None:
    tokens = load_tokenizer().tokenize(text)
    assert [t for t in tokens if re.search(r"\d", t)] == re.findall(r"\d", text)


def test_tool_markup_is_single_tokens_that_decoding_keeps() -> None:
    tokenizer = load_tokenizer()
    for token in MARKUP:
        ids = tokenizer.encode(token, add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == token
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        ids = tokenizer.encode(token, add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_the_template_shortens_schemas_and_spells_calls() -> None:
    assert render(CHAT, [PYTHON], prompt=True) == (
        '<|im_start|>system\n<tools>\n{"name": "python", "arguments": {"code": "string"}}\n</tools><|im_end|>\n'
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1234 * 567?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n699678\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nAnswer: 699678<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_calls_may_hold_their_arguments_as_json_text_and_follow_words() -> None:
    function = {"name": "python", "arguments": '{"code": "print(1234*567)"}'}
    message = {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"function": function}, {"function": function}],
    }
    assert render([message]) == f"<|im_start|>assistant\nLet me see.\n{CALL}\n{CALL}<|im_end|>\n"


def test_a_schema_without_arguments_and_one_without_types_are_rendered() -> None:
    now = {"type": "function", "function": {"name": "now"}}
    put = {"name": "put", "parameters": {"properties": {"x": {"type": ["integer", "null"]}, "y": {}}}}
    assert render(CHAT[:1], [now, put]).removesuffix(render(CHAT[:1])) == (
        '<|im_start|>system\n<tools>\n{"name": "now", "arguments": {}}\n'
        '{"name": "put", "arguments": {"x": ["integer", "null"], "y": "any"}}\n</tools><|im_end|>\n'
    )


@given(st.lists(st.sampled_from(CHAT), min_size=1, max_size=8), st.sampled_from([None, [PYTHON]]))
def test_messages_are_rendered_one_by_one(messages: list[dict[str, Any]], tools: Any) -> None:
    parts = [render([message]) for message in messages]
    opening = render(messages[:1], tools).removesuffix(parts[0])
    assert render(messages, tools) == opening + "".join(parts)
    assert bool(opening) == bool(tools)


@pytest.mark.parametrize("message", [{"role": "judge", "content": "x"}, {"role": "user", "content": [{"text": "x"}]}])
def test_what_the_template_cannot_render_it_refuses(message: dict[str, Any]) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="got"):
        render([message])


def test_an_episode_has_the_ids_of_the_whole_chat() -> None:
    chat, tokenizer = load_chat(None, [PYTHON]), load_tokenizer()
    context = chat.open(CHAT[:2])
    sampled = chat.encode_reply(CALL)
    context = np.concatenate([context, sampled, chat.extend(sampled, CHAT[3:4])])
    context = np.concatenate([context, chat.encode_reply("Answer: 699678")])
    whole = tokenizer.encode(render(CHAT, [PYTHON]).removesuffix("\n"), add_special_tokens=False)
    assert context.tolist() == whole


def test_prompts_are_short() -> None:
    assert len(load_chat().open([{"role": "user", "content": "What is 47 + 38?"}])) <= 20
    assert len(load_chat(None, [PYTHON]).open([{"role": "user", "content": "What is 1234 * 567?"}])) <= 48


def test_ordinary_english_is_not_spelled_out() -> None:
    text = "A farmer has twelve cows and sells a third of them at the market. How many are left, and what did he earn?"
    assert len(load_tokenizer().encode(text)) <= 0.6 * len(text)


def test_unseen_sums_leave_room_for_learning() -> None:
    """The promise of the default run: at most 60% greedy on sums that the corpus never held."""
    problems = unseen()
    said = replies([load_chat().open([{"role": "user", "content": p.question}]) for p in problems])
    worked = [re.fullmatch(r"\d\+\d=\d+, \d\+\d(\+1)?=\d+\. Answer: (\d+)", reply) for reply in said]
    right = [bool(m) and int(m[2]) == p.answer for m, p in zip(worked, problems, strict=True)]
    assert len(problems) > 600
    assert np.mean([bool(m) for m in worked]) > 0.99
    assert 0.45 <= np.mean(right) <= 0.60


@pytest.mark.parametrize(
    ("name", "argument", "wrap"), [("python", "code", "print({})"), ("calculator", "expression", "{}")]
)
def test_calls_copy_their_operands_and_answers_copy_results(name: str, argument: str, wrap: str) -> None:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    chat = load_chat(None, [{"type": "function", "function": {"name": name, "parameters": parameters}}])
    problems = unseen_large(96)
    contexts = [chat.open([{"role": "user", "content": p.question}]) for p in problems]
    calls = [{"name": name, "arguments": {argument: wrap.format(f"{p.a}{p.op}{p.b}")}} for p in problems]
    wanted = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
    said = replies(contexts, "<tool_call>")
    assert np.mean([s == w for s, w in zip(said, wanted, strict=True)]) >= 0.95

    sampled = [chat.encode_reply(w) for w in wanted]
    results = [[{"role": "tool", "content": str(p.answer)}] for p in problems]
    followed = [np.concatenate([c, s, chat.extend(s, r)]) for c, s, r in zip(contexts, sampled, results, strict=True)]
    answers = replies(followed)
    assert np.mean([a == f"Answer: {p.answer}" for a, p in zip(answers, problems, strict=True)]) >= 0.95
