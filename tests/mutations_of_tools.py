"""Bugs of tools: calls that are misread, servers that are lost.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

_FAULTS = "envs/test_mcp_faults.py::test_"
_IN_PROCESS = "envs/test_mcp_in_process.py::test_"
_FORMATS = "envs/test_tool_formats.py::test_"

TOOLS = (
    Mutant(
        "an argument without a closing tag takes all up to the next one",
        "envs/tools/parsers/tag_calls.py::TagCalls._goes_on",
        'if any(tag["key"].strip() in properties for tag in argument.finditer(value)):\n            return True',
        "return False",
        (f"{_FORMATS}an_argument_that_is_not_closed_takes_nothing_of_what_follows[qwen_xml]",),
    ),
    Mutant(
        "only the first of several calls in one tag is read",
        "envs/tools/parsers/json_calls.py::JsonCalls._at",
        "if bare or len(values) >= MOST_CALLS or not",
        "if True or not",
        (f"{_FORMATS}several_calls_in_one_tag",),
    ),
    Mutant(
        "a call in another format's form is the final answer",
        "envs/tools/parsers/formats.py::misplaced",
        "    if not starts:\n",
        "    if True:\n",
        (
            f"{_FORMATS}a_call_written_as_elsewhere_is_no_final_answer[Gemma 3-hermes]",
            "envs/test_tool_env.py::test_a_call_in_the_wrong_form_is_answered_and_not_graded",
        ),
    ),
    Mutant(
        "a session that its server forgot is a tool error",
        "envs/tools/mcp/http.py::HttpClient.send",
        'if request.method != "POST" or response.status_code < 400:',
        "if True:",
        (f"{_FAULTS}a_server_that_restarts_costs_the_episode_that_it_served_and_no_other",),
    ),
    Mutant(
        "sessions that were started ahead are handed out unasked",
        "envs/tools/mcp/session.py::Pool.take",
        "if not (waiting and self._remote) or",
        "if True or",
        (f"{_FAULTS}a_server_that_restarts_costs_the_episode_that_it_served_and_no_other",),
    ),
    Mutant(
        "a session that failed to start earlier is handed out",
        "envs/tools/mcp/session.py::Pool.take",
        "                if waiting:  # what failed",
        "                if False:  # what failed",
        (f"{_FAULTS}sessions_that_could_not_start_meanwhile_cost_no_episode",),
    ),
    Mutant(
        "a line of any length comes to the trainer",
        "envs/tools/mcp/supervisor.py::Output._too_long",
        "return longest > self._longest",
        "return False",
        ("envs/test_leash.py::test_a_server_that_writes_too_long_a_line_is_ended",),
    ),
    Mutant(
        "a result of any length is taken from a server of this process",
        "envs/tools/mcp/session.py::Session.call",
        "if message_size(result) > LONGEST:",
        "if False:",
        (f"{_FAULTS}what_a_server_of_this_process_sends_has_the_same_bound[act-arguments0]",),
    ),
    Mutant(
        "a server of this process writes as JSON what is too long",
        "envs/tools/mcp/in_process.py::_Measuring.run",
        "if await longer(got.value, LONGEST)",
        "if await longer(got.value, LONGEST * 100)",
        (f"{_IN_PROCESS}a_result_that_is_too_long_is_never_written_as_json[texts]",),
    ),
    Mutant(
        "what a tool gives to another tool is refused",
        "envs/tools/mcp/in_process.py::_Measuring.run",
        "with _set(False):",
        "with _set(True):",
        (f"{_IN_PROCESS}what_others_may_shorten_is_theirs",),
    ),
    Mutant(
        "what middleware would shorten is refused",
        "envs/tools/mcp/in_process.py::_handled",
        "return not all(hooks) or",
        "return",
        (f"{_IN_PROCESS}what_others_may_shorten_is_theirs",),
    ),
    Mutant(
        "a tool of a user's server is changed",
        "envs/tools/mcp/in_process.py::_measuring",
        "made = tool.model_copy()",
        "made = tool",
        (f"{_IN_PROCESS}the_server_itself_is_left_alone",),
    ),
    Mutant(
        "fields that are not written count",
        "envs/tools/mcp/length.py::_fields",
        ' or not whole(getattr(kind, "__pydantic_core_schema__", ""))',
        "",
        (f"{_IN_PROCESS}what_is_written_in_part_is_not_too_long",),
    ),
    Mutant(
        "every one of a hundred thousand texts is checked, in the loop of all sessions",
        "envs/tools/mcp/transport.py::_Dispatcher.send_raw_request",
        "len(content) > PARTS",
        "not content",
        (f"{_IN_PROCESS}texts_of_many_parts_are_joined_before_each_is_checked",),
    ),
    Mutant(
        "long results are compared with what the tool declares, in the loop of all sessions",
        "envs/tools/mcp/transport.py::_Session.validate_tool_result",
        "if message_size(result) <= COMPARED:",
        "if True:",
        (f"{_FAULTS}short_results_alone_are_compared_with_what_the_tool_declares",),
    ),
    Mutant(
        "a property without a type of its own is taken for one with it",
        "envs/tools/parsers/tag_calls.py::allows_string",
        "if not isinstance(schema, Mapping):\n        return False",
        "if not schema:\n        return False",
        ("envs/test_tool_formats.py::test_a_property_may_be_anything",),
    ),
    Mutant(
        "a suggestion is followed by a second end",
        "envs/tools/schema.py::_unknown",
        'return f"there is no argument {_at(path, name)} ({hint})"',
        'return f"there is no argument {_at(path, name)}; {hint}"',
        ("envs/test_tool_schema.py::test_a_suggestion_has_one_end",),
    ),
)
