"""What each chat template of the trl and vllm packages supports, as the table of docs/tools.md.

python tests/tool_table.py        # writes the table into docs/tools.md
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import templates as t

from llm_gym.chat import Chat
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import open_thinking
from llm_gym.errors import TemplateError

PAGE = Path(__file__).parents[1] / "docs" / "tools.md"
BEGIN, END = "<!-- table: python tests/tool_table.py -->", "<!-- end of table -->"
VLLM = Path(next(iter(importlib.util.find_spec("vllm").submodule_search_locations)))
VLLM_NAMES = sorted(p.stem for p in (VLLM / "transformers_utils" / "chat_templates").glob("*.jinja"))
NAMES = [*t.NAMES, *(f"vllm/{name}" for name in VLLM_NAMES)]

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "What for."},
                "count": {"type": "integer", "description": "How many."},
                "sure": {"type": "boolean", "description": "Whether to."},
                "where": {"type": "array", "description": "Where.", "items": {"type": "object"}},
            },
            "required": ["text"],
        },
    },
}
SCHEMAS = {"look_up": TOOL["function"]["parameters"]}
CASES: dict[str, dict[str, Any]] = {
    "plain text": {"text": "Two words"},
    "line breaks": {"text": "a = 1\n\nprint(a)\n"},
    'quotes "': {"text": 'print("a")'},
    "quotes '": {"text": "print('a')"},
    "backslashes": {"text": "a\\n\\\\b"},
    "markup": {"text": "if a<b>c: </b> & 🙂 é"},
    "numbers": {"text": "7", "count": -12},
    "true and false": {"text": "a", "sure": False},
    "lists and objects": {"text": "a", "where": [{"a": [1, 2.5], "b": "x y"}]},
    "null in a list": {"text": "a", "where": [{"a": None}]},
}
"""Arguments by what is hard about them."""


@dataclass(frozen=True)
class Row:
    """What one template supports."""

    results: str
    """Whether results of tools extend a context exactly; else why not."""
    format: str
    several: str
    arguments: str


FOLDER = TemporaryDirectory()
"""Holds the generation_config.json of the tokenizers as long as the process."""


@cache
def chat_for(name: str, tools: bool) -> Chat | TemplateError:
    """The chat of a template, or why there is none."""
    try:
        return Chat(tokenizer(name), [TOOL] if tools else None)
    except TemplateError as error:
        return error


@cache
def tokenizer(name: str) -> Any:
    """The tokenizer of a template."""
    if name.startswith("vllm/"):
        path = VLLM / "transformers_utils" / "chat_templates" / f"{name[5:]}.jinja"
        return t.tokenizer(path.read_text("utf-8"))
    folder = Path(FOLDER.name) / name
    folder.mkdir()
    return t.made_for(name, folder)


def calls_back(chat: Chat, form: formats.Format, arguments: list[dict[str, Any]]) -> Any:
    """What `form` reads from the template's own rendering of calls with these arguments, or why there is none."""
    why: Any = None
    for style in ("dict", "json"):
        try:
            prompt, reply = chat.calling([("look_up", value) for value in arguments], [TOOL], style)
        except TemplateError as error:
            why = error
            continue
        found = formats.read(form, reply, open_thinking(prompt), SCHEMAS)
        return [(call.name, call.arguments) for call in found if not call.error]
    return why


def row(name: str) -> Row:
    """The table's row of one template."""
    chat = chat_for(name, True)
    if isinstance(chat, TemplateError):
        whole = isinstance(chat_for(name, False), Chat)
        if not whole:
            return Row("no: refused altogether", "-", "-", "-")
        return Row("no: results are refused or dropped", "in words", "-", "-")
    try:
        form = formats.detect(chat)
    except TemplateError as error:
        shown = "shows no tools" if "does not show" in str(error) else "writes no calls"
        return Row("yes", f"in words ({shown})", "-", "-")
    two = [CASES["plain text"], CASES["numbers"]]
    several = calls_back(chat, form, two) == [("look_up", value) for value in two]
    lost = [case for case, value in CASES.items() if calls_back(chat, form, [value]) != [("look_up", value)]]
    return Row("yes", form.name, "yes" if several else "no", "all but " + ", ".join(lost) if lost else "all")


def table() -> str:
    """The table in Markdown, templates with the same row together."""
    together: dict[Row, list[str]] = {}
    for name in NAMES:
        together.setdefault(row(name), []).append(name)
    lines = ["| templates | results extend exactly | format | several calls | arguments read back |", "|" + "---|" * 5]
    for found, names in sorted(together.items(), key=lambda item: (item[0].results, item[0].format, item[1])):
        lines.append("| " + " | ".join([shown(names), *astuple(found)]) + " |")
    return "\n".join(lines)


def shown(names: list[str]) -> str:
    """Names, a `_training` variant with its original."""
    pairs = [name + " (+ training)" if f"{name}_training" in names else name for name in names]
    return ", ".join(
        name
        for name in pairs
        if name.removesuffix("_training") not in names or "(" in name or not name.endswith("_training")
    )


def page(text: str) -> str:
    """The page with its table made anew."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
