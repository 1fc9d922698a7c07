"""Bugs of tools: calls that are misread, servers that are lost.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from mutations import Mutant

_FORMATS = "envs/test_tool_formats.py::test_"

TOOLS = (
    Mutant(
        "an argument without a closing tag takes all up to the next one",
        "envs/tools/tag_calls.py",
        'if any(tag["key"].strip() in properties for tag in argument.finditer(value)):\n            return True',
        "return False",
        (f"{_FORMATS}an_argument_that_is_not_closed_takes_nothing_of_what_follows[qwen_xml]",),
    ),
    Mutant(
        "only the first of several calls in one tag is read",
        "envs/tools/json_calls.py",
        "if bare or len(values) >= MOST_CALLS or not",
        "if True or not",
        (f"{_FORMATS}several_calls_in_one_tag",),
    ),
    Mutant(
        "a call in another format's form is the final answer",
        "envs/tools/formats.py",
        "    if not starts:\n",
        "    if True:\n",
        (
            f"{_FORMATS}a_call_written_as_elsewhere_is_no_final_answer[Gemma 3-hermes]",
            "envs/test_tool_env.py::test_a_call_in_the_wrong_form_is_answered_and_not_graded",
        ),
    ),
)
