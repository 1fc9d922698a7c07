"""Bugs in chat templates given by name, and in tools said in words.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

TEMPLATES = (
    Mutant(
        "a format is read that the model was not shown",
        "envs/tools/parsers/formats.py::_tool_chat",
        "if shown and (found is wanted or",
        "if shown and (chosen is not None or found is wanted or",
        ("envs/test_tool_words.py::test_every_format_asked_for_is_shown_and_read[llama-qwen3]",),
    ),
    Mutant(
        "results of one reply are several messages",
        "envs/tools/parsers/words.py::InWords._said",
        'return [{"role": "user", "content": "\\n".join(map(self._shown, messages))}]',
        'return [{"role": "user", "content": self._shown(m)} for m in messages]',
        ("envs/test_tool_words.py::test_tools_are_shown_called_and_answered[gemma]",),
    ),
    Mutant(
        "the description takes the place of the author's system message",
        "envs/tools/parsers/words.py::InWords._told",
        '"\\n\\n".join([*(m["content"] for m in own), text])',
        "text",
        ("envs/test_tool_words.py::test_the_authors_system_message_stays",),
    ),
    Mutant(
        "fine-tuning shows no tools where the template has none",
        "harness/data/sft_examples.py::encode.chat",
        "formats.tool_chat(tokenizer, tools)[0] if tools else load_chat(tokenizer)",
        "load_chat(tokenizer, tools)",
        ("envs/test_tool_words.py::test_fine_tuning_shows_what_the_environment_shows[llama3-tools]",),
    ),
    Mutant(
        "contexts of a base model lack the control token that its texts begin with",
        "templates.py::with_template",
        '(_written_first(tokenizer) or bos * "{{ bos_token }}") + NAMED[chat_template]',
        "NAMED[chat_template]",
        ("test_templates.py::test_a_control_token_is_written_first_where_the_tokenizer_does",),
    ),
    Mutant(
        "the template of a run is lost when the run is saved",
        "harness/loops/group_learner.py::GroupLearner.save",
        "load_tokenizer(self.config.model, self.config.chat_template)",
        "load_tokenizer(self.config.model)",
        ("harness/test_chat_template.py::test_a_base_model_trains_by_name",),
    ),
)
