"""Bugs of the doors: what agents say and hear, and what others play."""

from planted import Mutant

CHAT, ROLLOUTS = "serving/test_chat_door.py", "serving/test_rollouts.py"

DOORS = (
    Mutant(
        "a forced beginning is trained",
        "serving/chat_sessions.py::ChatSession.answer",
        "reply = _Reply(context, completion,",
        "reply = _Reply(prompt, completion,",
        (f"{CHAT}::test_a_forced_call_begins_in_the_context_and_is_not_trained",),
    ),
    Mutant(
        "what stands behind a stop sequence is trained",
        "serving/chat_sessions.py::ChatSession.answer",
        "completion, text = cut(chat, drawn, request.stop)",
        "completion, text = drawn, cut(chat, drawn, request.stop)[1]",
        (f"{CHAT}::test_a_stop_sequence_cuts_what_is_said_and_what_is_trained",),
    ),
    Mutant(
        "a reply is recognised only with its white space",
        "serving/chat_requests.py::link",
        'content = " ".join(content.split())',
        "content = content.strip(chr(0))",
        (f"{CHAT}::test_a_reply_that_comes_back_without_its_thinking_is_continued",),
    ),
    Mutant(
        "a recorded chat is rendered again",
        "serving/chat_sessions.py::ChatSession._prompt",
        "if links[n] in known and",
        "if not known and",
        (f"{CHAT}::test_a_reply_that_comes_back_without_its_thinking_is_continued",),
    ),
    Mutant(
        "the same question is answered alike",
        "serving/chat_sessions.py::ChatSession.answer",
        "seed = self._request_seed(links[-1], self._asked[links[-1]])",
        "seed = self._request_seed(links[-1], 1)",
        (f"{CHAT}::test_the_same_question_twice_is_answered_twice",),
    ),
    Mutant(
        "a group is accepted twice",
        "serving/leases.py::Board._end",
        "del self._leases[lease.id]",
        "pass",
        (f"{ROLLOUTS}::test_every_task_ends_once_whatever_players_do",),
    ),
    Mutant(
        "a refused task is lost",
        "serving/leases.py::Board.post",
        "self._offers.appendleft(held.offer)",
        "pass",
        (f"{ROLLOUTS}::test_every_task_ends_once_whatever_players_do",),
    ),
    Mutant(
        "versions of groups from elsewhere are not looked at",
        "serving/group_check.py::_wrong",
        "if not (versions[0] <= first and last <= versions[1]):",
        "if first > last:",
        (f"{ROLLOUTS}::test_a_group_that_is_not_sound_is_refused_and_played_again[older weights]",),
    ),
)
