"""MCP's answers in the words of a chat: results as text, tool lists as schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_gym.envs.tools.parsers.literals import DEEPEST

DROPPED = frozenset({"$schema", "$id", "$defs", "definitions", "title"})
"""Keywords of a schema that say nothing about an argument."""
MOST_PARTS = 10_000
"""Parts of a schema after which its references are no longer put in place."""
LONGEST = 8 << 20
"""Bytes of one message from a server: it is read in the loop that all sessions share."""
TOO_LONG = f"it sent a message of more than {LONGEST >> 20} MiB"
NOT_SENT = "llm_gym/not_sent"
"""Marks, in its `meta`, what stands for a result that is too long: a server of this process need not send it."""
CONTENT = frozenset({"text", "image", "audio", "resource", "resource_link"})
"""Types of content that MCP knows."""


def result_text(result: Any) -> str:
    """A `CallToolResult` as text: texts as they are, other content described, else the structured content as JSON."""
    parts = [part for part in map(_block_text, result.content or ()) if part]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _block_text(block: Any) -> str:
    kind = block.type
    if kind == "text":
        return str(block.text)
    if kind in ("image", "audio"):
        return f"[{kind}: {block.mime_type}, {_size(block.data)} bytes]"
    if kind == "resource_link":
        about = f": {block.description}" if block.description else ""
        return f"[resource {block.uri}, {block.name}{about}]"
    if kind == "resource":
        resource = block.resource
        if getattr(resource, "text", None) is not None:
            return f"[resource {resource.uri}]\n{resource.text}"
        return f"[resource {resource.uri}: {resource.mime_type}, {_size(resource.blob)} bytes]"
    return f"[{kind}]"


def message_size(result: Any) -> int:
    """Bytes of a `CallToolResult` as JSON; where its texts alone are too long, their characters, counted at no cost."""
    if NOT_SENT in (result.meta or ()):
        return LONGEST + 1
    texts = sum(len(getattr(block, "text", "")) for block in result.content or ())
    return texts if texts > LONGEST else len(result.model_dump_json())


def not_mcp(error: Any) -> str:
    """What is wrong with a message that the protocol's types refused (a pydantic `ValidationError`), in a few words."""
    errors = error.errors()
    unknown = {str(one["input"]) for one in errors if one["type"] == "literal_error"} - CONTENT
    if unknown:
        return f"unknown type {', '.join(map(repr, sorted(unknown)))}"
    first = next((one for one in errors if one["type"] != "literal_error"), errors[0])
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _size(base64: str) -> int:
    """Bytes that a base64 text stands for."""
    return len(base64) * 3 // 4 - base64[-2:].count("=")


def tool_schema(name: str, tool: Any) -> dict[str, Any]:
    """The function-calling schema of an MCP `Tool`, to be called `name`."""
    parameters = resolved(tool.input_schema or {}, tool.input_schema or {})
    parameters.setdefault("type", "object")
    parameters.setdefault("properties", {})
    function = {"name": name, "description": (tool.description or "").strip(), "parameters": parameters}
    return {"type": "function", "function": function}


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A JSON schema with its local references put in place and what no model needs dropped.

    A schema that contains itself accepts anything there, and so does a reference that leads through more than
    `DEEPEST` others, or that comes when `MOST_PARTS` are in place: a few definitions that use each other twice are
    more than any model can read.
    """
    left = MOST_PARTS

    def placed(part: Any, inside: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        if isinstance(part, list):
            return [placed(item, inside) for item in part]
        if not isinstance(part, Mapping):
            return part
        if "$ref" in part:
            reference = str(part["$ref"])
            if reference in inside or len(inside) >= DEEPEST or left < 0:
                return {}
            rest = {key: value for key, value in part.items() if key != "$ref"}
            return placed({**_find(reference, root), **rest}, (*inside, reference))
        return {
            key: {name: placed(item, inside) for name, item in value.items()}  # a property may be called `title`
            if key in ("properties", "patternProperties") and isinstance(value, Mapping)
            else placed(value, inside)
            for key, value in part.items()
            if key not in DROPPED
        }

    return placed(schema, ())


def _find(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `#/$defs/Name` points to; nothing for a reference that leads elsewhere."""
    pointer, _, path = reference.partition("#")
    found: Any = {} if pointer else root
    for part in path.split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def public_names(tools: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, Any]]:
    """Name shown to the model -> (server, MCP tool): the tool's own, with the server's before it where two clash."""
    names = [tool.name for listed in tools.values() for tool in listed]
    return {
        (f"{server}_{tool.name}" if names.count(tool.name) > 1 else tool.name): (server, tool)
        for server, listed in tools.items()
        for tool in listed
    }
