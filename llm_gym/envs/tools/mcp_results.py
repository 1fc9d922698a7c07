"""MCP's answers in the words of a chat: results as text, tool lists as schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

DROPPED = frozenset({"$schema", "$id", "$defs", "definitions", "title"})
"""Keywords of a schema that say nothing about an argument."""


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


def resolved(schema: Any, root: Mapping[str, Any], inside: tuple[str, ...] = ()) -> Any:
    """A JSON schema with its local references put in place and what no model needs dropped.

    A schema that contains itself (`inside` are the references being followed) accepts anything there.
    """
    if isinstance(schema, list):
        return [resolved(item, root, inside) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        reference = str(schema["$ref"])
        if reference in inside:
            return {}
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return resolved({**_find(reference, root), **rest}, root, (*inside, reference))
    return {
        key: _each(value, root, inside) if key in ("properties", "patternProperties") else resolved(value, root, inside)
        for key, value in schema.items()
        if key not in DROPPED
    }


def _each(properties: Any, root: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    """The schemas of named properties; a property may be called `title`."""
    if not isinstance(properties, Mapping):
        return properties
    return {name: resolved(schema, root, inside) for name, schema in properties.items()}


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
