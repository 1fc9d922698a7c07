"""Exact extension on every chat template of the trl package, with arbitrary texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
import templates as t

from llm_gym.chat import Chat
from llm_gym.errors import TemplateError

pytestmark = pytest.mark.heavy
every_template = pytest.mark.parametrize("name", t.NAMES)
few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
characters = st.sampled_from("aZ 09\n\t.,<|>/{}\"'\\é日🙂\u200d#_=") | st.characters(codec="utf-8")
texts = st.text(characters, max_size=40).filter(t.ordinary)


@cache
def chat_for(name: str, tools: bool) -> Chat | TemplateError:
    with TemporaryDirectory() as folder:
        try:
            return Chat(t.made_for(name, Path(folder)), [t.PYTHON] if tools else None)
        except TemplateError as error:
            return error


def supported(name: str, tools: bool) -> Chat:
    chat = chat_for(name, tools)
    return chat if isinstance(chat, Chat) else pytest.fail(str(chat))


@every_template
@few
@given(text=texts)
def test_opening_is_what_transformers_renders(name: str, text: str) -> None:
    chat = supported(name, False)
    assert chat.open([t.user(text)]).tolist() == t.full_render(chat, [t.user(text)])


@every_template
@few
@given(question=texts, answer=texts, more=texts, turns=st.integers(1, 3))
def test_user_turns_are_the_end_of_the_full_render(
    name: str, question: str, answer: str, more: str, turns: int
) -> None:
    chat = supported(name, False)
    history = [t.user(question), t.assistant(answer + ".")] * turns
    cut = chat.extend([], [t.user(more)])
    assert t.full_render(chat, [*history, t.user(more)])[-len(cut) :] == cut.tolist()
    assert_drops_a_sampled_terminator(chat, cut, [t.user(more)])


@pytest.mark.parametrize("name", [name for name in t.NAMES if name not in t.NO_TOOL_TURN])
@few
@given(question=texts, outputs=st.lists(texts, min_size=1, max_size=3), turns=st.integers(1, 2))
def test_tool_turns_are_the_end_of_the_full_render(name: str, question: str, outputs: list[str], turns: int) -> None:
    chat = supported(name, True)
    if name.startswith("llama3_"):
        outputs = outputs[:1]  # it refuses to render a reply with several calls
    if name.startswith("deepseek"):
        turns = 1  # it forgets to open the block of results from the second time on
    form = "json" if name == "deepseekv3" else "dict"
    one_turn = [t.calling(["print(1)"] * len(outputs), form), *t.results(outputs)]
    cut = chat.extend([], t.results(outputs))
    assert t.full_render(chat, [t.user(question), *one_turn * turns])[-len(cut) :] == cut.tolist()
    assert_drops_a_sampled_terminator(chat, cut, t.results(outputs))


def assert_drops_a_sampled_terminator(chat: Chat, cut: Any, messages: Any) -> None:
    """A reply that ended in the very token that the extension starts with must not get it twice."""
    if int(cut[0]) in chat.stop_ids:
        assert chat.extend([7, int(cut[0])], messages).tolist() == cut[1:].tolist()
    assert chat.extend([7], messages).tolist() == cut.tolist()


@pytest.mark.parametrize("name", sorted(t.NO_TOOL_TURN))
def test_templates_without_tool_results_are_refused_with_the_reason(name: str) -> None:
    assert isinstance(chat_for(name, False), Chat)
    error = chat_for(name, True)
    assert isinstance(error, TemplateError)
    assert "['tool']" in str(error)
    assert "dropped or moved" in str(error) or "refuses" in str(error)


@every_template
@few
@given(data=st.data())
def test_control_tokens_in_text_stay_text(name: str, data: Any) -> None:
    chat = supported(name, False)
    control = [str(token) for token in chat.tokenizer.added_tokens_decoder.values() if token.special]
    spelled = "a" + "".join(data.draw(st.lists(texts | st.sampled_from(control), max_size=6))) + "z"
    plain = [chat.open([t.user("a")]), chat.extend([], [t.user("a")])]
    hostile = [chat.open([t.user(spelled)]), chat.extend([], [t.user(spelled)])]
    for expected, ids in zip(plain, hostile, strict=True):
        assert list(control_ids(chat, ids)) == list(control_ids(chat, expected))
        assert spelled in chat.tokenizer.decode(ids, skip_special_tokens=False)


def control_ids(chat: Chat, ids: Any) -> Iterator[int]:
    special = {i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    return (i for i in ids.tolist() if i in special)
