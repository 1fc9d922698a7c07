"""Chat templates: compiled, and for tokenizers that have none: two by name, or any Jinja file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_gym.core import Messages
from llm_gym.errors import ConfigError, TemplateError, unknown

PLAIN = """\
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ m.content + '\\n\\n' }}
{%- elif m.role == 'user' %}{{ 'User:\\n' + m.content + '\\n\\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant:\\n' + m.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('plain text has no role ' + m.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif -%}
"""
"""Text as a model reads it anywhere: who speaks on a line of its own. Only the end of a reply is a control token."""
CHATML = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
NAMED = {"plain": PLAIN, "chatml": CHATML}
DATE = datetime(2025, 1, 1)
"""What templates get for "today": a context must be a function of the seed, not of the day."""
MARKS = ("<|im_start|>", "<|im_end|>")
"""What `chatml` needs, each a control token."""


def renderer(
    tokenizer: Any, tools: Sequence[dict[str, Any]] | None
) -> Callable[[Messages, Sequence[dict[str, Any]] | None, bool], str]:
    """The compiled template as a function of (messages, tools, whether to add the generation prompt).

    Raises:
        TemplateError: the tokenizer has none, or it is not Jinja.
    """
    try:
        source = tokenizer.get_chat_template(None, tools)
    except Exception as error:
        raise TemplateError(no_template(getattr(tokenizer, "name_or_path", ""))) from error
    render = _compiled(source).render
    fixed = {**tokenizer.special_tokens_map, "documents": None, "strftime_now": DATE.strftime}

    def rendered(messages: Messages, tools: Sequence[dict[str, Any]] | None, prompt: bool) -> str:
        return str(render(messages=messages, tools=tools, add_generation_prompt=prompt, **fixed))

    return rendered


def _compiled(source: str) -> Any:
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(source)
    except JinjaError as error:
        line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise TemplateError(f"chat template: it is not Jinja ({str(error).rstrip('.')}{line}).") from error


def no_template(name: str) -> str:
    """What to say of a tokenizer without a template."""
    return (
        f"tokenizer: {name!r} has no chat template; pass chat_template=plain (--chat-template plain), chatml, or the "
        "path of a .jinja file."
    )


def read_template(chat_template: str | Path | None) -> str | None:
    """A name of `NAMED` as it is; of a file its text; text itself, or None, as it is.

    A run writes what this gives into its settings, so that it does not depend on the file afterwards.

    Raises:
        ConfigError: no such name and no such file, or one that is no template.
    """
    if chat_template is None:
        return None
    given = str(chat_template)
    if given in NAMED or _is_jinja(given):
        return given
    try:
        text = Path(given).expanduser().read_text("utf-8")
    except FileNotFoundError:
        if given.endswith((".jinja", ".j2", ".txt")) or "/" in given:
            raise ConfigError(f"chat_template: no file {given!r}.") from None
        raise ConfigError(unknown("chat_template", given, [*NAMED, "the path of a .jinja file"])) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: cannot read {given!r:.200}: {error!s:.200}.") from error
    if not _is_jinja(text):
        raise ConfigError(f"chat_template: the file {given!r} is no chat template: it has no Jinja in it.")
    try:
        _compiled(text)
    except TemplateError as error:
        raise ConfigError(f"chat_template: the file {given!r} cannot be used; {error}") from error
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


@lru_cache(maxsize=32)
def with_template(tokenizer: Any, chat_template: str | None, bos: bool = False) -> Any:
    """A copy of a tokenizer that shares all with it but the template; the same one for the same arguments.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: from `read_template`; None: the tokenizer's own.
        bos: whether a text begins with BOS even if this tokenizer does not put it there.

    Raises:
        ConfigError: the template of that name needs tokens that the tokenizer lacks.
    """
    if chat_template is None:
        return tokenizer
    made = copy.copy(tokenizer)
    made.chat_template = chat_template
    if chat_template in NAMED:
        _check_tokens(tokenizer, chat_template)
        made.chat_template = (_written_first(tokenizer) or bos * "{{ bos_token }}") + NAMED[chat_template]
    return made


def _check_tokens(tokenizer: Any, name: str) -> None:
    called = getattr(tokenizer, "name_or_path", "")
    if name == "plain" and not tokenizer.eos_token:
        raise ConfigError(f"chat_template: 'plain' ends a reply with the EOS token, but {called!r} has none.")
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if name == "chatml" and (missing := [mark for mark in MARKS if mark not in control]):
        raise ConfigError(
            f"chat_template: 'chatml' needs {missing[0]} as a control token, which {called!r} lacks; pass plain."
        )


def _written_first(tokenizer: Any) -> str:
    """The control tokens that the tokenizer itself puts before a text (BOS), as Jinja: contexts are encoded without."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return "".join("{{ %s }}" % json.dumps(token) for token in tokenizer.convert_ids_to_tokens(whole[:at]))  # noqa: UP031
