"""Rows of a data set as chats, and chats as sequences to be trained: only what the assistant said is trained.

A row holds `messages`, or a `prompt` and a `completion` (under those names or others), and `tools` if the
assistant had any. Contexts come from `llm_gym.chat`, the code that environments use, so that a model is trained
on exactly the ids that it will read later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llm_gym.chat import load_chat
from llm_gym.core import Ids, Message, Messages
from llm_gym.envs.rows import load_rows
from llm_gym.envs.tools.parsers import formats
from llm_gym.errors import DataError, TemplateError, unknown
from llm_gym.harness.data.sft_replies import as_tree, reply_ids
from llm_gym.harness.types import TrainSequence

T = TypeVar("T")
U = TypeVar("U")
Example = Mapping[str, Any]
"""`{"messages": [...], "tools": [...] | None}`."""

NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation"),
    "prompt": ("prompt", "question", "instruction"),
    "completion": ("completion", "answer", "response", "output"),
    "tools": ("tools",),
}
"""What a row holds -> the usual names of its column."""


def load_examples(
    dataset: str,
    split: str = "train",
    *,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
) -> list[Example]:
    """The chats of a data set.

    Args:
        dataset: a hub id, or the path of a .jsonl, .json, .parquet or .csv file.
        split: of the hub data set, slices included (`train[:95%]`); for a file only the slice counts.
        subset: the configuration of a hub data set, where it has several.
        columns: see `find_columns`.
        system_prompt: see `read_example`.

    Raises:
        DataError: nothing there, no such column, or a row that is no chat; rows are counted from 0.
    """
    rows = load_rows(dataset, split, name=subset)
    if Path(dataset).suffix not in (".json", ".jsonl"):
        rows = [_without_nulls(row) for row in rows]
    found = find_columns({name: None for row in rows for name in row}, columns or {})  # a file's rows may be ragged

    def read(row: Mapping[str, Any]) -> Example:
        return read_example(row, found, system_prompt)

    return _each(rows, read, dataset)


def encode_all(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, cut: bool = False, where: str = "the examples"
) -> tuple[list[TrainSequence], dict[str, int]]:
    """Chats as training rows, and how many were too long.

    Args:
        examples: the chats.
        tokenizer: the model's.
        max_length: most tokens of a row.
        cut: whether a longer row is cut behind `max_length` tokens; else, and if nothing trained is left, it is
            dropped.
        where: what the examples are called in errors.

    Returns:
        The rows, and the counts `dropped` and `cut`.

    Raises:
        DataError: one cannot be trained on (with its number, from 0), or none is short enough.
    """
    rows = _each(examples, lambda example: encode(example, tokenizer), where)
    short = [row if len(row.tokens) <= max_length else row.first(max_length if cut else 0) for row in rows]
    kept = [row for row in short if len(row.trained)]
    if not kept:
        raise DataError(f"dataset: every chat of {where} is longer than max_length={max_length}.")
    shortened = sum(a is not b and len(b.trained) > 0 for a, b in zip(rows, short, strict=True))
    return kept, {"dropped": len(rows) - len(kept), "cut": int(shortened)}


def find_columns(present: Collection[str], given: Mapping[str, str]) -> dict[str, str]:
    """Which column holds what: `messages`, or `prompt` and `completion`; and `tools`, if it is there.

    Args:
        present: every column that any row of the data has.
        given: what a row holds -> the name of its column, where that is no usual one.

    Raises:
        DataError: a column that is not there, or no chat in the usual columns.
    """
    for part, column in given.items():
        if part not in NAMES:
            raise DataError(unknown("columns", part, NAMES))
        if column not in present:
            said = unknown(f"columns.{part}", column, present).rstrip(".")
            raise DataError(f"{said} (columns: {', '.join(present)}).")
    usual = {part: next((name for name in names if name in present), "") for part, names in NAMES.items()}
    found = {part: name for part, name in {**usual, **given}.items() if name}
    pairs = "messages" not in found or (given.keys() & {"prompt", "completion"} and "messages" not in given)
    chat = ("prompt", "completion") if pairs else ("messages",)
    if missing := [part for part in chat if part not in found]:
        raise DataError(
            f"columns: the data has no column for {missing[0]!r} (columns: {', '.join(present)}); "
            f"name it, as in columns.{missing[0]}=NAME."
        )
    return {part: found[part] for part in (*chat, "tools") if part in found}


def read_example(row: Mapping[str, Any], columns: Mapping[str, str], system_prompt: str | None = None) -> Example:
    """A row of data as a chat.

    Args:
        row: the row.
        columns: from `find_columns`.
        system_prompt: put before a chat that has no system message.

    Raises:
        DataError: the row holds something else.
    """
    if "messages" in columns:
        messages = _messages(row, columns["messages"])
    else:
        messages = [
            *_messages(row, columns["prompt"], "user"),
            *_messages(row, columns["completion"], "assistant"),
        ]
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    tools = as_tree(row.get(columns.get("tools", ""))) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise DataError(f"column {columns['tools']!r} holds {tools!r:.60}, want a list of tool schemas.")
    return {"messages": messages, "tools": tools}


def encode(example: Example, tokenizer: Any) -> TrainSequence:
    """A chat as a training row: trained where the assistant speaks, stop tokens included.

    Contexts are extended exactly as in an episode, so a chat that an environment could have produced
    becomes the very ids that the environment would have shown. An assistant message with `train: false` or
    `weight: 0` is context only.

    Raises:
        DataError: no assistant message to train, one without a prompt, or one that is no text.
        TemplateError: the template refuses the chat.
    """
    messages, tools = list(example["messages"]), example.get("tools")
    chat = formats.tool_chat(tokenizer, tools)[0] if tools else load_chat(tokenizer)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise DataError(f"messages: want a prompt and then an assistant message, got roles {_roles(messages)}.")
    flags = [trains(message) for message in messages]
    if not any(flags):
        raise DataError("messages: none is trained; every assistant message says not to.")
    last = max(i for i, flag in enumerate(flags) if flag)
    opening = messages[: turns[0]]
    parts = [(chat.open(opening), False)]
    for turn, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        parts.append((reply_ids(chat, messages[turn], parts[-1][0], opening), flags[turn]))
        if turn == last:
            break  # what is said after the last trained reply trains nothing
        parts.append((chat.extend(parts[-1][0], messages[turn + 1 : following]), False))
    return _sequence(parts)


def trains(message: Message) -> bool:
    """Whether a message is trained: an assistant's, unless `train: false` or `weight: 0` says otherwise.

    Raises:
        DataError: a flag of another value, or one that asks for another role's message.
    """
    said = [message[name] for name in ("train", "weight") if message.get(name) is not None]
    if any(flag not in (0, 1) for flag in said):
        raise DataError(f"messages: train or weight is {said[0]!r}, want true or false (1 or 0).")
    mine = message["role"] == "assistant"
    if not mine and any(said):
        raise DataError(f"messages: one of role {message['role']!r} is to be trained; only the assistant's can be.")
    return mine and all(said)


# Inside


def _each(items: Sequence[T], make: Callable[[T], U], where: str) -> list[U]:
    """`make` of every item; what it raises gets the item's number."""
    made = []
    for number, item in enumerate(items):
        try:
            made.append(make(item))
        except (DataError, TemplateError) as error:
            raise DataError(f"dataset: row {number} of {where}: {error}") from error
    return made


def _messages(row: Mapping[str, Any], column: str, role: str | None = None) -> Messages:
    """The messages of a cell: a list, or with `role` a text; contents in parts become texts."""
    value = row.get(column)
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    value = as_tree(value)
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) and m.get("role") for m in value):
        want = "a list of messages with roles" if role is None else "text, or a list of messages with roles"
        raise DataError(f"column {column!r} holds {row.get(column)!r:.60}, want {want}.")
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> Message:
    """Without the nulls that a table fills in, and with its content as text."""
    kept = {name: value for name, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise DataError(f"messages: the {kept['role']}'s content has parts that are no text.")
        kept["content"] = "".join(part["text"] for part in content)
    elif content is None and not kept.get("tool_calls") and not kept.get("reasoning_content"):
        raise DataError(f"messages: a message of role {kept['role']!r} has no content.")
    elif content is not None and not isinstance(content, str):
        raise DataError(f"messages: the {kept['role']}'s content is {content!r:.60}, want text.")
    return kept


def _sequence(parts: Sequence[tuple[Ids, bool]]) -> TrainSequence:
    """Contexts and replies in turn, with which of them are trained; each token is credited with 1."""
    tokens = np.concatenate([ids for ids, _ in parts]).astype(np.int32)
    trained = np.flatnonzero(np.repeat([flag for _, flag in parts], [len(ids) for ids, _ in parts]))
    known: dict[str, npt.NDArray[Any]] = {
        "old_logprobs": np.zeros(len(trained), np.float32),
        "advantages": np.ones(len(trained)),
    }
    return TrainSequence(tokens, trained, known)


def _without_nulls(value: Any) -> Any:
    """The tree without null values: a table gives every object the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]
