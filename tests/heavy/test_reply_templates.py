"""Replies of data as every chat template of the trl and vllm packages writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import templates as t
import tool_table as table

from llm_gym.chat import Chat
from llm_gym.harness.data.sft_replies import reply_ids

pytestmark = pytest.mark.heavy
NAMES = [name for name in table.NAMES if isinstance(table.chat_for(name, False), Chat)]
THOUGHTS, ANSWER = "Two and two.", "Four, surely."
BOTH = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"
ELSEWHERE = ("deepseek", "nemotron")
"""Templates that write a reply without thinking elsewhere than behind their own generation prompt."""


def trained(name: str, **reply: Any) -> tuple[str, str]:
    """The generation prompt that answers a question, and the text of the reply behind it, stop token included."""
    chat = table.chat_for(name, False)
    assert isinstance(chat, Chat)
    ids = reply_ids(chat, {"role": "assistant", **reply})
    assert ids[-1] in chat.stop_ids
    return tuple(chat.tokenizer.decode(i, skip_special_tokens=False) for i in (chat.open([t.user("q")]), ids))


def rendered(name: str, reply: str) -> str:
    chat = table.chat_for(name, False)
    assert isinstance(chat, Chat)
    from llm_gym.chat import DATE

    messages = [t.user("q"), t.assistant(reply)]
    if chat.reads_parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return chat.tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=DATE.strftime)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", [ANSWER, f"  {ANSWER} \n"])
def test_a_plain_reply_is_what_transformers_renders(name: str, answer: str) -> None:
    prompt, reply = trained(name, content=answer)
    assert reply.count(ANSWER) == 1
    if not name.startswith(ELSEWHERE):
        whole = rendered(name, answer)
        end = reply[reply.index(ANSWER) + len(ANSWER) :].strip()
        assert (prompt + reply).startswith(whole.rstrip()) or whole.startswith(prompt + reply), end


@pytest.mark.parametrize("name", NAMES)
def test_whatever_its_form_a_reply_is_trained_once(name: str) -> None:
    prompt, text = trained(name, content=BOTH)
    opened = prompt.rstrip().endswith("<think>")
    forms: list[dict[str, Any]] = [{"content": ANSWER, field: THOUGHTS} for field in ("reasoning_content", "thinking")]
    if opened:
        forms.append({"content": f"{THOUGHTS}\n</think>\n\n{ANSWER}"})
    for form in forms:
        assert trained(name, **form)[1] == text
    assert (text.count(THOUGHTS), text.count(ANSWER)) == (1, 1)
    assert text.index(THOUGHTS) < text.index(ANSWER)
    assert text.count("<think>") == text.count("</think>") - opened <= 1
    plain, empty = trained(name, content=ANSWER)[1], trained(name, content=ANSWER, reasoning_content="")[1]
    assert plain == empty
    assert plain.count("<think>") == plain.count("</think>") - opened <= 1
