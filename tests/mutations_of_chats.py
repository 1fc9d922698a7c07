"""Bugs that chats could have: replies encoded out of place, thinking doubled or lost, a tokenizer read wrong.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

CHATS = (
    Mutant(
        "a reply is encoded by itself, with a space in front",
        "tokenizer.py::Coder.encode_behind",
        "return self._behind([left, *self._neutral] if fixed else self._neutral, text)",
        "return self._encode(text)",
        ("test_chat_in_place.py::test_no_space_is_put_in_front_of_a_reply",),
    ),
    Mutant(
        "thinking in tags is written again behind a prompt that opened it",
        "harness/data/sft_replies.py::_parts",
        "if not (begins or (opened and closed)):",
        "if not opened or True:",
        ("harness/test_replies.py::test_thinking_that_the_prompt_opened_is_gone_on_from",),
    ),
    Mutant(
        "thinking that the template drops is lost without a word",
        "harness/data/sft_replies.py::_says_once",
        "        if at < len(part):\n            return False\n",
        "",
        ("harness/test_replies.py::test_thinking_is_written_as_the_template_writes_it",),
    ),
    Mutant(
        "a plain reply lacks the template's frame",
        "harness/data/sft_replies.py::reply_ids.text",
        'text = next(writings, "") or _spelled(said, prompt) + chat.ending',
        "text = _spelled(said, prompt) + chat._stops[chat.stop_ids[0]]",
        ("harness/test_replies.py::test_a_plain_reply_has_the_templates_frame",),
    ),
    Mutant(
        "thinking is closed that no prompt opened",
        "harness/data/sft_replies.py::reply_ids.fits",
        "said.closed and open_thinking(prompt) == open_thinking(usual)",
        "said.closed",
        ("harness/test_replies.py::test_where_no_prompt_follows_a_tools_result_nothing_is_closed",),
    ),
    Mutant(
        "the class named beside a tokenizer puts its own rules in place of the file's",
        "tokenizer.py::_loader",
        'if whole or config.get("tokenizer_class") in PLAIN_CLASSES:',
        'if config.get("tokenizer_class") in PLAIN_CLASSES:',
        ("test_tokenizer.py::test_the_file_is_loaded_as_it_is_whatever_class_is_named",),
    ),
)
