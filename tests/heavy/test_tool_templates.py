"""Tool calls and exact extension on every chat template of the trl and vllm packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
import templates as t
import tool_table as table

from llm_gym.chat import Chat
from llm_gym.core import Messages
from llm_gym.env import Reply
from llm_gym.envs.tools import ToolEnv
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import THINKING, ToolCall, open_thinking
from llm_gym.errors import TemplateError

pytestmark = pytest.mark.heavy
few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
codes = st.text(st.sampled_from("aZ 09\n\t.,<|>/{}[]()\"'\\é日🙂#_=") | st.characters(codec="utf-8"), max_size=40)
WITH_FORMAT = [name for name in table.NAMES if table.row(name).several != "-"]
EXTENDED = [name for name in table.VLLM_NAMES if isinstance(table.chat_for(f"vllm/{name}", False), Chat)]


def supported(name: str) -> Chat:
    chat = table.chat_for(name, True)
    assert isinstance(chat, Chat)
    return chat


def test_the_published_table_is_true() -> None:
    text = table.PAGE.read_text("utf-8")
    assert table.page(text) == text, "run python tests/tool_table.py"


def test_most_templates_are_supported() -> None:
    assert len(WITH_FORMAT) >= 44
    assert {table.row(name).format for name in WITH_FORMAT} >= {
        "hermes",
        "qwen_xml",
        "glm",
        "llama",
        "pythonic",
        "gemma",
    }


@pytest.mark.parametrize("name", [name for name in WITH_FORMAT if table.row(name).arguments == "all"])
@few
@given(code=codes)
def test_any_text_is_read_back_from_what_the_template_writes(name: str, code: str) -> None:
    chat = supported(name)
    form = formats.detect(chat)
    if '<|"|>' in code or "</" in code or any(tag in code for tag in THINKING):
        code = "x"  # the tags that these formats quote with, and those of thinking, in which no call counts
    if name.startswith("lfm2"):
        code = code.replace("\x7f", "").encode("ascii", "ignore").decode()  # JSON escapes beyond ASCII, Python's too
    assert table.calls_back(chat, form, [{"text": code}]) == [("look_up", {"text": code})]


@pytest.mark.parametrize("name", WITH_FORMAT)
@few
@given(answer=codes, calls=st.integers(1, 3))
def test_an_episode_goes_on_exactly(name: str, answer: str, calls: int) -> None:
    """Calls written as the format writes them run, and their results stand in the next context."""

    def look_up(text: str) -> str:
        """Looks something up.

        Args:
            text: what for.
        """
        return f"found {answer} for {text}!"

    class Library(ToolEnv):
        def open(self) -> Messages:
            return [{"role": "user", "content": "Go."}]

        def final(self, text: str) -> Reply:
            return Reply(done=True)

    env = Library([look_up], tokenizer=supported(name).tokenizer, max_context=100_000, max_tokens=10_000)
    context, _ = env.reset(seed=0)
    call = env.format.notation.write([ToolCall("look_up", {"text": f"no. {i}"}) for i in range(calls)])
    closing = open_thinking(env.chat.text(context))
    sampled = env.chat.encode_reply(closing + call)
    following, _, terminated, truncated, info = env.step(sampled)
    env.close()
    assert (terminated, truncated) == (False, False)
    assert following[: len(context) + len(sampled)].tolist() == [*context.tolist(), *sampled.tolist()]
    results = [m["content"] for m in info["messages"][2:]]
    assert results == [f"found {answer} for no. {i}!" for i in range(calls)]
    text = env.chat.tokenizer.decode(following[len(context) + len(sampled) :], skip_special_tokens=False)
    places = [text.index(f" for no. {i}!") for i in range(calls)]
    assert places == sorted(places)


@pytest.mark.parametrize("name", WITH_FORMAT)
def test_properties_without_a_type(name: str) -> None:
    given, got = t.calls_without_types(table.tokenizer(name))
    assert got == given


@pytest.mark.parametrize("name", EXTENDED)
@few
@given(question=codes, more=codes)
def test_templates_of_vllm_extend_exactly(name: str, question: str, more: str) -> None:
    chat = table.chat_for(f"vllm/{name}", False)
    assert isinstance(chat, Chat)
    cut = chat.extend([], [t.user(more)])
    history = [t.user(question), t.assistant("Yes."), t.user(more)]
    assert t.full_render(chat, history)[-len(cut) :] == cut.tolist()


@pytest.mark.parametrize("name", sorted(set(table.VLLM_NAMES) - set(EXTENDED)))
def test_templates_of_vllm_that_do_not_end_a_reply_are_refused(name: str) -> None:
    error = table.chat_for(f"vllm/{name}", False)
    assert isinstance(error, TemplateError)
    assert any(why in str(error) for why in ("no stop token", "refuses", "dropped", "does not render"))
