"""Tool calls in every format: written and read back, told apart, hostile text survived."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_gym.chat import load_chat
from llm_gym.envs.tools.parsers.calls import MOST_CALLS, ToolCall, open_thinking, without_calls, without_thinking
from llm_gym.envs.tools.parsers.formats import FORMATS, detect, read
from llm_gym.envs.tools.parsers.literal_calls import code_tool

JSON_FORMATS = ["hermes", "llama", "mistral", "harmony", "deepseek", "kimi"]
TAG_FORMATS = ["qwen_xml", "glm", "invoke"]
NATIVE = [name for name, form in FORMATS.items() if form.native]
every_format = pytest.mark.parametrize("name", FORMATS)

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": ["number", "null"]},
        "deep": {"anyOf": [{"type": "array"}, {"type": "object"}]},
        "sure": {"type": "boolean"},
    },
    "required": ["text"],
}
SCHEMAS = {"look.up-1": SCHEMA, "f": SCHEMA}
texts = st.text(st.sampled_from("aZ 09\n\t.,:;<>/|[]{}()=\"'\\`é🙂#_") | st.characters(codec="utf-8"), max_size=30)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
arguments = st.fixed_dictionaries(
    {"text": texts},
    optional={
        "count": st.integers(),
        "ratio": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "deep": st.lists(values, max_size=3) | st.dictionaries(texts, values, max_size=3),
        "sure": st.booleans(),
    },
)
calls = st.lists(st.tuples(st.sampled_from(["f", "look.up-1"]), arguments), min_size=1, max_size=3)


def as_data(found: list[ToolCall]) -> list[tuple[str, Any]]:
    assert [call.error for call in found] == [""] * len(found)
    return [(call.name, call.arguments) for call in found]


@pytest.mark.parametrize("name", JSON_FORMATS)
@given(made=calls)
def test_json_formats_hold_any_arguments(name: str, made: list[tuple[str, Any]]) -> None:
    notation = FORMATS[name].notation
    text = notation.write([ToolCall(*call) for call in made])
    found = notation.read(text, SCHEMAS)
    assert as_data(found) == made
    if name != "kimi":
        assert without_calls(text, found).replace("<|start|>assistant", "") == ""


@pytest.mark.parametrize("name", TAG_FORMATS)
@given(made=calls)
def test_tag_formats_hold_any_arguments_but_their_own_tags(name: str, made: list[tuple[str, Any]]) -> None:
    notation = FORMATS[name].notation
    if name != "qwen_xml":  # GLM and `invoke` write no line breaks around a value
        assert "\n" not in notation.pair.partition("{value}")[2].rstrip("\n")
    text = notation.write([ToolCall(*call) for call in made])
    assert as_data(notation.read(text, SCHEMAS)) == made


@given(made=calls)
def test_pythonic_holds_any_arguments(made: list[tuple[str, Any]]) -> None:
    notation = FORMATS["pythonic"].notation
    text = notation.write([ToolCall(*call) for call in made])
    assert as_data(notation.read(text, SCHEMAS)) == made
    assert as_data(notation.read(f"<|tool_call_start|>{text}<|tool_call_end|>", SCHEMAS)) == made


@given(made=calls)
def test_gemma_holds_any_arguments_but_its_own_quotes(made: list[tuple[str, Any]]) -> None:
    notation = FORMATS["gemma"].notation
    text = notation.write([ToolCall(*call) for call in made])
    assert as_data(notation.read(text, SCHEMAS)) == made


@given(codes=st.lists(texts, min_size=1, max_size=3))
def test_fenced_blocks_hold_any_code_but_a_fence(codes: list[str]) -> None:
    notation = FORMATS["python_block"].notation
    codes = [code for code in codes if not re.search(r"^[^\S\n]*```", code, re.M)] or ["1"]
    text = notation.write([ToolCall("f", {"text": code}) for code in codes])
    assert as_data(notation.read(f"Some words\n{text}\nmore", {"f": SCHEMA})) == [
        ("f", {"text": code}) for code in codes
    ]


def test_a_property_may_be_anything() -> None:
    """`true`, or nothing at all, in place of a schema; tests/heavy has every template."""
    notation = FORMATS["qwen_xml"].notation
    for schema in ({"properties": {"x": True}, "required": ["x"]}, {"properties": {"x": {}}}, {"properties": None}, {}):
        found = notation.read(notation.write([ToolCall("act", {"x": "a b"})]), {"act": schema})
        assert as_data(found) == [("act", {"x": "a b"})]
    assert code_tool({"act": {"properties": {"x": True}, "required": ["x"]}}) == ("", "")


def test_values_that_hold_their_own_closing_tag() -> None:
    """A value ends where its tag closes and the call goes on, so code about tags can be written."""
    code = "print('</parameter>')\nx = '</function>'"
    for name in TAG_FORMATS:
        notation = FORMATS[name].notation
        value = code.replace("</parameter>", notation.ends.replace("{ns}", ""))
        text = notation.write([ToolCall("f", {"text": value, "count": 3})])
        assert as_data(notation.read(text, SCHEMAS)) == [("f", {"text": value, "count": 3})]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", 'Ok.\n<tool_call>{"name": "f", "arguments": {"text": "a\nb"}}', {"text": "a\nb"}),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"text\\": \\"a\\"}"}</tool_call>', {"text": "a"}),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', {}),
        ("hermes", '<tool_call>[{"name": "f", "arguments": {"count": 1}}]</tool_call>', {"count": 1}),
        ("llama", '<|python_tag|>{"name": "f", "parameters": {"text": "a"}}', {"text": "a"}),
        ("llama", '{"type": "function", "name": "f", "parameters": {"text": "a"}}', {"text": "a"}),
        ("llama", 'I call {"type": "function", "function": {"name": "f", "arguments": {}}}', {}),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"text": "a"}, "id": "abc123def"}]', {"text": "a"}),
        ("mistral", '[TOOL_CALLS]f{"text": "a"}', {"text": "a"}),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"text": "a"}', {"text": "a"}),
        ("harmony", ' to=functions.f<|channel|>commentary json<|message|>{"text": "a"}', {"text": "a"}),
        (
            "harmony",
            "<|channel|>analysis<|message|>I call to=functions.g.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.f <|constrain|>json<|message|>{"text": "a"}<|call|>',
            {"text": "a"},
        ),
        ("harmony", '<|channel|>analysis to=functions.f code<|message|>{"text": "a"}', {"text": "a"}),
        ("harmony", '<|channel|>commentary to=f <|constrain|>json<|message|>{"text": "a"}<|call|>', {"text": "a"}),
        ("llama", '<function=f>{"text": "a"}</function>', {"text": "a"}),
        ("llama", '{"type": "function", "function": "f", "parameters": {"text": "a"}}', {"text": "a"}),
        ("hermes", '<tool_calls>\n{"name": "f", "arguments": {"text": "a"}}\n</tool_calls>', {"text": "a"}),
        ("deepseek", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"text": "a"}<｜tool▁call▁end｜>', {"text": "a"}),
        ("kimi", '<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{"text": "a"}<|tool_call_end|>', {"text": "a"}),
        ("qwen_xml", "<function=f>\n<parameter=count>\n3\n</parameter>\n<parameter=sure>\nTrue\n</parameter></function>", {"count": 3, "sure": True}),
        ("qwen_xml", "<tool_call>\n<function=f>\n</function>\n</tool_call>", {}),
        ("glm", "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", {"text": "3"}),
        ("invoke", '<x:invoke name="f"><x:parameter name="text">3</x:parameter></x:invoke>', {"text": "3"}),
        ("invoke", '<｜DSML｜invoke name="f"><｜DSML｜parameter name="count" string="false">3</｜DSML｜parameter></｜DSML｜invoke>', {"count": 3}),
        ("pythonic", "<|python_start|>[f(text='a', deep=[1, {'k': None}], sure=true,)]<|python_end|>", {"text": "a", "deep": [1, {"k": None}], "sure": True}),
        ("pythonic", "[f(text='two\nlines', ratio=-1_0.5e1)]", {"text": "two\nlines", "ratio": -105.0}),
        ("pythonic", "f(text='a', count=1)", {"text": "a", "count": 1}),
        ("pythonic", "Let me see.\n[f(text='a')]", {"text": "a"}),
        ("pythonic", "So: <|python_start|>f(text='a')<|python_end|>", {"text": "a"}),
        ("pythonic", "<|tool_call_start|>[f(text='a')]<|tool_call_end|>", {"text": "a"}),
        ("pythonic", "```tool_code\nf(text='a')\n```", {"text": "a"}),
        ("gemma", "<start_function_call>call:f{text:<escape>a<escape>,count:1}<end_function_call>", {"text": "a", "count": 1}),
        ("gemma", '<|tool_call>call:f{deep:{k:[None,<|"|>x<|"|>]}}<tool_call|>', {"deep": {"k": [None, "x"]}}),
    ],
)  # fmt: skip
def test_spellings_that_models_use(name: str, text: str, expected: dict[str, Any]) -> None:
    assert as_data(FORMATS[name].notation.read(text, SCHEMAS)) == [("f", expected)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("hermes", "<tool_call>\nf(1)\n</tool_call> and more", "not valid JSON: Expecting value at character 0"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "must have the form"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"count": NaN}}</tool_call>', "NaN is no JSON number"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"count": 1e999}}</tool_call>', "1e999 is too large"),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 99 + "]" * 99 + "}", "levels of nesting"),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 99999, "levels of nesting"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"count": ' + "1" * 5000 + "}}", "Exceeds the limit"),
        ("llama", '{"name": "f", "parameters": {"text": "a}}', "not valid JSON: Unterminated string"),
        ("mistral", "[TOOL_CALLS] none", "not valid JSON"),
        ("qwen_xml", "<function=f>text</function>", "want an argument or the end of the call, got 'text</function>'"),
        ("qwen_xml", "<function=f><parameter=text>a", "the argument 'text' is not closed"),
        ("qwen_xml", "<function=f><parameter=text>a</parameter><parameter=text>b</parameter></function>", "given twice"),
        ("glm", "<tool_call>f<arg_key>text</arg_key><arg_value>a</tool_call>", "'text' is not closed"),
        ("glm", "<tool_call>f\n", "want an argument or the end of the call, but the text ends"),
        ("glm", '<tool_call>{"name": "f"}</tool_call>', """got '{"name": "f"}</tool_"""),
        ("harmony", "<|channel|>commentary to=f<|message|>{}{}", "one JSON object of arguments, got 2"),
        ("llama", "<|python_tag|>print(1)", "not valid JSON"),
        ("llama", 'I call {"name": "f", "parameters": {"text": "a}', "not valid JSON"),
        ("llama", 'I call {"name": "f", "text": "a"}', "must have the form"),
        ("pythonic", "f(2)", "want a name or a value"),
        ("pythonic", "```tool_code\nprint(f(text='a'))\n```", "the form is [name("),
        ("pythonic", "<|tool_call_start|>[]<|tool_call_end|>", "want a call"),
        ("python_block", "```python print(1)```", "on the line below"),
        ("python_block", "```python", "not closed by a line of ```"),
        ("pythonic", "[f(1)]", "want a name or a value, got '1)]'; the form is [name("),
        ("pythonic", "[f(text=g)]", "want a value, got 'g)]'"),
        ("pythonic", "[f(text='a', text='b')]", "only once"),
        ("pythonic", "[f(text='a'", "but the text ends"),
        ("gemma", "<|tool_call>call:f{text:<|\"|>a}<tool_call|>", 'want a closing <|"|>'),
        ("python_block", "```python\nprint(1)", "not closed by a line of ```"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(name: str, text: str, words: str) -> None:
    (call,) = FORMATS[name].notation.read(text, SCHEMAS)
    assert words in call.error
    assert call.start < call.stop <= len(text)


@pytest.mark.parametrize("name", NATIVE)
def test_plain_answers_are_no_calls(name: str) -> None:
    for text in (
        "Answer: 42",
        "",
        'As JSON: {"name": "Ada", "age": 36}',
        "[1, 2](link)",
        "I would call f(text='a').",
        "```python\nprint(1)\n```",
        "<function> <tool>",
        "f(x) = 2x, so the slope is 2",
        '{"names": ["f"], "parameters": 3}',
    ):
        assert read(FORMATS[name], text, "", SCHEMAS) == []


def test_what_harmony_says_to_itself_is_no_call() -> None:
    thought = "<|channel|>analysis<|message|>Like <tool_call>, or functions.f, or [TOOL_CALLS]f?<|end|>"
    text = f"{thought}<|start|>assistant<|channel|>final<|message|>4"
    assert read(FORMATS["harmony"], text, "", SCHEMAS) == []


CALL = ToolCall("f", {"text": "a"})
ELSEWHERE = {name: FORMATS[name].notation.write([CALL]) for name in NATIVE} | {
    "JSON without a tag": '{"name": "f", "arguments": {"text": "a"}}',
    "Gemma 3": "```tool_code\nprint(f(text='a'))\n```",
    "FunctionGemma": "<start_function_call>call:f{text:<escape>a<escape>}<end_function_call>",
    "a tag and nothing that can be read": "<|tool_call_begin|>f(a)",
}


@every_format
@pytest.mark.parametrize("written", ELSEWHERE)
def test_a_call_written_as_elsewhere_is_no_final_answer(name: str, written: str) -> None:
    """It is read where that is this format's too (a block of Python is code); else the model is told how to write it."""
    found = read(FORMATS[name], ELSEWHERE[written], "", SCHEMAS)
    assert found
    for call in found:
        assert call.error or (call.name, call.arguments) == (CALL.name, CALL.arguments) or name == "python_block"


def test_several_calls_in_one_tag() -> None:
    one, two = '{"name": "f", "arguments": {"text": "a"}}', '{"name": "f", "arguments": {"text": "b"}}'
    for joint in ("\n", ",", ";\n"):
        text = f"<tool_call>\n{one}{joint}{two}\n</tool_call>"
        found = FORMATS["hermes"].notation.read(text, SCHEMAS)
        assert as_data(found) == [("f", {"text": "a"}), ("f", {"text": "b"})]
        assert without_calls(text, found) == ""
    first, second = FORMATS["hermes"].notation.read(f'<tool_call>{one}\n{{"name": </tool_call>', SCHEMAS)
    assert first.error == ""
    assert "not valid JSON" in second.error
    assert as_data(FORMATS["pythonic"].notation.read("f(text='a')\nf(text='b')", SCHEMAS)) == [
        ("f", {"text": "a"}),
        ("f", {"text": "b"}),
    ]


@pytest.mark.parametrize("name", TAG_FORMATS)
def test_an_argument_that_is_not_closed_takes_nothing_of_what_follows(name: str) -> None:
    """Not the next argument, and not the next call."""
    notation = FORMATS[name].notation
    ends = notation.ends.replace("{ns}", "")
    argument = notation.write([ToolCall("f", {"text": "a", "count": 3})]).replace(ends, "", 1)
    (call,) = notation.read(argument, SCHEMAS)
    assert "the argument 'text' is not closed" in call.error
    broken, whole = notation.write([CALL]).replace(ends, ""), notation.write([ToolCall("f", {"text": "b"})])
    first, second = notation.read(f"{broken}\nAnd then:\n{whole}", SCHEMAS)
    assert "the argument 'text' is not closed" in first.error
    assert as_data([second]) == [("f", {"text": "b"})]


@every_format
@settings(max_examples=150)
@given(data=st.data())
def test_no_text_breaks_a_reader(name: str, data: Any) -> None:
    """Pieces of markup in any order: reading raises nothing, and places lie within the text, in order."""
    written = FORMATS[name].notation.write(
        [ToolCall("f", {"text": "a", **({"count": 1} if name != "python_block" else {})})]
    )
    cuts = [written[i:j] for i in range(0, len(written), 3) for j in (i + 4, i + 9, len(written))]
    pieces = st.sampled_from([written, *cuts, "<think>", "</think>", "{", "}", '"', "\\", "[", "]", "(", ")", "\n"])
    text = "".join(data.draw(st.lists(pieces | texts, max_size=12)))
    found = read(FORMATS[name], text, data.draw(st.sampled_from(["", "</think>"])), SCHEMAS)
    for call in found:
        assert 0 <= call.start <= call.stop <= len(text)
        json.dumps(call.arguments, allow_nan=False)
    assert [call.start for call in found] == sorted(call.start for call in found)
    without_calls(text, found)


HOSTILE = {
    "opened again and again": lambda w: w[: len(w) // 2] * 9999,
    "never closed": lambda w: w[:-3] + "x" * 300_000,
    "brackets": lambda w: w[: w.index("a")] + "[{(" * 99_999,
    "quotes": lambda w: w[: w.index("a")] + "\"'" * 99_999,
    "backslashes": lambda w: w[: w.index("a")] + "\\" * 300_000,
    "spaces": lambda w: w.replace("\n", " ") + " " * 300_000 + w,
    "many calls": lambda w: (w + "\n") * 3_000,
    "starts": lambda w: w[:3] * 99_999,
    "thinking": lambda w: "<think></think>" * 20_000 + w,
    "line breaks": lambda w: w[:-1] + "\n" * 300_000,
}


@every_format
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_takes_linear_time(name: str, kind: str) -> None:
    """Ten times the text takes far less than a hundred times as long: about ten, where quadratic reading shows."""
    whole = HOSTILE[kind](FORMATS[name].notation.write([ToolCall("f", {"text": "a"})]))[:300_000]

    def seconds(text: str) -> float:
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            found = read(FORMATS[name], text, "", SCHEMAS)
            best = min(best, time.process_time() - started)
            assert len(found) <= MOST_CALLS
        return best

    assert seconds(whole) < 40 * seconds(whole[: len(whole) // 10]) + 0.05


def test_thinking_is_blanked_in_place() -> None:
    assert without_thinking("a<think>b</think>c") == "a" + " " * 16 + "c"
    assert without_thinking("a<think>b") == "a" + " " * 8
    assert without_thinking("b</think>c", "</think>") == " " * 9 + "c"
    assert without_thinking("b</think>c") == "b</think>c"
    assert without_thinking("[THINK]<think>[/THINK]c") == " " * 22 + "c"
    assert open_thinking("<|im_start|>assistant\n<think>\n") == "</think>"
    assert open_thinking("<think>\n\n</think>\n\n") == ""


@given(text=texts, closing=st.sampled_from(["", "</think>"]))
def test_blanking_keeps_places(text: str, closing: str) -> None:
    blank = without_thinking(text, closing)
    assert len(blank) == len(text)
    assert all(b in (" ", a) for a, b in zip(text, blank, strict=True))


def test_the_embedded_model_writes_hermes() -> None:
    assert detect(load_chat()).name == "hermes"
