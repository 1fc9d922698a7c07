"""A reply in any form is trained as the template writes it behind its own generation prompt, once."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from small_models import stretches

sys.path.insert(0, str(Path(__file__).parents[1]))
import templates as t

from llm_gym.chat import Chat, load_chat
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import ToolCall
from llm_gym.harness.data.sft_examples import encode
from llm_gym.harness.data.sft_replies import reply_ids

ASK = t.user("2+2?")
THOUGHTS, ANSWER = "Two and two.", "Four, surely."
BOTH = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"
FORMS: dict[str, dict[str, Any]] = {
    "both tags": {"content": BOTH},
    "both tags, close": {"content": f"<think>{THOUGHTS}</think>{ANSWER}"},
    "a field": {"content": ANSWER, "reasoning_content": THOUGHTS},
    "another field": {"content": ANSWER, "reasoning": THOUGHTS},
    "a third field": {"content": ANSWER, "thinking": THOUGHTS},
    "both": {"content": BOTH, "reasoning_content": THOUGHTS},
    "closing tag": {"content": f"{THOUGHTS}\n</think>\n\n{ANSWER}"},
}
FOLDER = TemporaryDirectory()


@cache
def tokenizer(name: str) -> Any:
    folder = Path(FOLDER.name) / name
    folder.mkdir()
    return t.made_for(name, folder)


def trained(name: str, reply: dict[str, Any], *before: dict[str, Any], tools: Any = None) -> str:
    """The text of a row's last reply, stop token included."""
    messages = [*(before or [ASK]), {"role": "assistant", **reply}]
    row = encode({"messages": messages, "tools": tools}, tokenizer(name))
    last = slice(*stretches(row)[-1])
    assert row.tokens[-1] in load_chat(tokenizer(name), tools).stop_ids
    return tokenizer(name).decode(row.tokens[last], clean_up_tokenization_spaces=False)


OPENED = ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano", "nemotron_3_ultra", "deepseekv3"]
"""Templates whose generation prompt opens thinking."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPENED)
def test_thinking_that_the_prompt_opened_is_gone_on_from(name: str, form: str) -> None:
    text = trained(name, FORMS[form])
    assert text.startswith(THOUGHTS)
    assert (text.count("<think>"), text.count("</think>"), text.count(ANSWER)) == (0, 1, 1)
    assert text == trained(name, FORMS["a field"]), "every form is the same reply"


@pytest.mark.parametrize("name", OPENED)
def test_a_reply_without_thinking_closes_what_the_prompt_opened(name: str) -> None:
    text = trained(name, {"content": ANSWER})
    assert text.lstrip().startswith("</think>")
    assert (text.count("think>"), text.count(ANSWER)) == (1, 1)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "closing tag"])
@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("qwen3", BOTH + "<|im_end|>"),
        ("qwen2_5", BOTH + "<|im_end|>"),  # the template knows no thinking
        ("qwen3_5_nothink", BOTH + "<|im_end|>"),  # the prompt has an empty one
        ("lfm2_2_5", f"<think>{THOUGHTS}</think>{ANSWER}<|im_end|>"),
        ("glm4moe", f"\n<think>{THOUGHTS}</think>\n{ANSWER}<|user|>"),
        ("gemma4_v5", f"<|channel>thought\n{THOUGHTS}\n<channel|>{ANSWER}<turn|>"),
        (
            "gptoss",
            f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
        ),
        ("cohere2", BOTH + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    ],
)
def test_thinking_is_written_as_the_template_writes_it(name: str, want: str, form: str) -> None:
    close = form == "both tags, close" and name in ("qwen2_5", "qwen3_5_nothink", "cohere2")
    text = trained(name, FORMS[form])
    assert text == (want.replace(BOTH, FORMS[form]["content"]) if close else want)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("cohere2", "  Four. \n<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("gemma", "Four.<end_of_turn>"),
        ("gemma3", "Four.<end_of_turn>"),
        ("llama3_1", "Four.<|eot_id|>"),
        ("qwen2_5", "  Four. \n<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\n  Four. \n<|im_end|>"),
        ("gptoss", "<|channel|>final<|message|>  Four. \n<|return|>"),
        ("glm4moe", "\n<think></think>\nFour.<|user|>"),
        ("llava_next", "   Four. \n</s>"),
        ("phi3", "  Four. \n<|end|>"),
        ("deepseekv3", "\n</think>\n\n  Four. \n<｜end▁of▁sentence｜>"),
    ],
)
def test_a_plain_reply_has_the_templates_frame(name: str, want: str) -> None:
    assert trained(name, {"content": "  Four. \n"}) == want


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "gptoss"])
def test_thinking_that_was_cut_stays_open(name: str) -> None:
    opened = name == "qwen3_6"
    assert trained(name, {"content": f"<think>\n{THOUGHTS}"}).startswith(THOUGHTS if opened else f"<think>\n{THOUGHTS}")


def ids_without(chat: Chat, context: Any, end: str) -> Any:
    size = len(chat.tokenizer.encode(end, add_special_tokens=False))
    assert chat.text(context[-size:]) == end
    return context[:-size]


def test_where_no_prompt_follows_a_tools_result_nothing_is_closed() -> None:
    """DeepSeek opens thinking behind a question, and adds no generation prompt behind the results of tools."""
    chat = Chat(tokenizer("deepseekv3"), None)
    row = encode({"messages": [ASK, t.assistant("Wait."), t.user("Go."), t.assistant(ANSWER)]}, tokenizer("deepseekv3"))
    assert chat.text(row.tokens[slice(*stretches(row)[1])]) == f"\n</think>\n\n{ANSWER}"
    context = chat.extend(chat.encode_reply("Wait."), t.results(["4"]))
    assert not chat.text(context).endswith("<think>\n")
    assert chat.text(reply_ids(chat, t.assistant(ANSWER), context)) == ANSWER
    qwen = Chat(tokenizer("qwen3_6"), None)
    bare = ids_without(qwen, qwen.open([ASK]), "<think>\n")
    assert qwen.text(reply_ids(qwen, t.assistant(ANSWER), bare)) == ANSWER


@pytest.mark.parametrize("said", [{"content": BOTH.removesuffix(ANSWER)}, {"reasoning_content": THOUGHTS}])
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_6", "qwen3_5_nothink", "llama3_1", "gptoss", "gemma4", "nemotron_3_nano"]
)
def test_thinking_before_a_call_is_trained_once_and_the_call_reads_back(name: str, said: dict[str, Any]) -> None:
    reply = {**said, "tool_calls": [{"function": {"name": "python", "arguments": {"code": "2+2"}}}]}
    row = encode({"messages": [ASK, {"role": "assistant", **reply}], "tools": [t.PYTHON]}, tokenizer(name))
    chat = load_chat(tokenizer(name), [t.PYTHON])
    text = chat.text(row.tokens[row.trained])
    assert text.count(THOUGHTS) == 1
    closing = "</think>" if name in OPENED else ""
    (call,) = formats.read(formats.detect(chat), text, closing, {"python": t.PYTHON["function"]["parameters"]})
    assert (call.name, call.arguments, call.start > text.index(THOUGHTS)) == ("python", {"code": "2+2"}, True)


def test_a_call_beside_which_the_template_writes_nothing_is_still_trained() -> None:
    """Llama's template leaves out the text beside a call, and text in front of bare JSON would hide it."""
    reply = {"content": "Let me see.", "tool_calls": [{"function": {"name": "python", "arguments": {"code": "2+2"}}}]}
    assert '"code": "2+2"' in trained("llama3_1", reply, tools=[t.PYTHON])


def test_a_system_prompt_may_change_the_frame() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'assistant' and messages[0].role == 'system' %}<|done|>{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = t.tokenizer(template)
    for before, want in (([ASK], "4<|im_end|>"), ([{"role": "system", "content": "s"}, ASK], "4<|done|><|im_end|>")):
        row = encode({"messages": [*before, t.assistant("4")]}, made)
        assert made.decode(row.tokens[row.trained]) == want


def test_rows_are_contexts_of_an_episode() -> None:
    """Every reply stands where an environment would have let a policy say it."""
    made = tokenizer("qwen3_6")
    chat = load_chat(made)
    messages = [ASK, t.assistant(BOTH), t.user("Sure?"), t.assistant("Yes.")]
    row = encode({"messages": messages}, made)
    context = chat.open([ASK])
    for turn, following in ((0, [t.user("Sure?")]), (1, None)):
        assert row.tokens[: len(context)].tolist() == context.tolist()
        reply = row.tokens[slice(*stretches(row)[turn])]
        context = np.concatenate([context, reply, *([] if following is None else [chat.extend(reply, following)])])
    assert context.tolist() == row.tokens.tolist()


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
@pytest.mark.parametrize("thoughts", ["", THOUGHTS])
def test_calls_in_words_are_trained_where_the_prompt_opens_thinking(name: str, thoughts: str) -> None:
    reply = {**t.calling(["print(2 + 2)"]), "content": "Let me see.", "reasoning_content": thoughts}
    row = encode({"messages": [ASK, reply, *t.results(["4"]), t.assistant("4")], "tools": [t.PYTHON]}, tokenizer(name))
    chat, form = formats.tool_chat(tokenizer(name), [t.PYTHON])
    assert chat.open([ASK]).tolist() == row.tokens[: row.trained[0]].tolist()
    text = chat.text(row.tokens[slice(*stretches(row)[0])])
    assert (
        text
        == f"{thoughts}\n</think>\n\nLet me see.\n{form.notation.write([ToolCall('python', {'code': 'print(2 + 2)'})])}"
    )
