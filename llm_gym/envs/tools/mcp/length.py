"""How long what a tool's function returned is at least, once it is written as JSON: counted no further than a bound."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Final

import mcp_types
from fastmcp.utilities.types import Audio, File, Image
from pydantic import BaseModel

DEEPEST: Final = 200
"""Containers within each other; what is deeper, or holds itself, is an error that the library names."""
CHUNK: Final = 500
"""Values looked at together, by functions that are written in C."""
LENGTHS: dict[type, Callable[[list[Any]], int]] = {
    str: lambda values: sum(map(str.__len__, values)),
    bytes: lambda values: sum(map(bytes.__len__, values)),
    int: lambda values: max(0, 3 * sum(map(int.bit_length, values)) - 13 * len(values)) // 10,  # log10(2) > .3
    float: lambda values: sum(map(len, map(float.__repr__, values))) - 3 * len(values),  # 1e-7 for 1e-07
    dict: lambda values: 4 * sum(map(dict.__len__, values)),
    **dict.fromkeys((list, tuple, set, frozenset, deque), lambda values: 2 * sum(map(len, values))),
}
"""Kind -> bytes of such values beyond the first of each; of a container a byte and a comma for all that it holds."""
PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    **dict.fromkeys((list, tuple, set, frozenset, deque), iter),
    dict: lambda value: chain(value, value.values()),
    **dict.fromkeys((Image, Audio, File, mcp_types.ImageContent, mcp_types.AudioContent), lambda value: (value.data,)),
    **dict.fromkeys((mcp_types.TextContent, mcp_types.TextResourceContents), lambda value: (value.text,)),
    mcp_types.EmbeddedResource: lambda value: (value.resource,),
    mcp_types.BlobResourceContents: lambda value: (value.blob,),
}
"""Kind -> what such a value holds that is written too."""


async def longer(value: Any, most: int) -> bool:
    """Whether a value is surely more than `most` bytes of JSON; of an object of unknown kind a byte is sure.

    Others in the loop go on meanwhile. What changes under its hands counts as short: the library looks at it once more.

    Args:
        value: what a tool returned: text, numbers, containers, content of MCP, pydantic models, dataclasses.
        most: where counting stops.
    """
    levels: list[Iterator[Any]] = [iter((value,))]
    while levels and len(levels) <= DEEPEST:
        try:
            values = list(islice(levels[-1], CHUNK))
        except RuntimeError:  # another thread has changed its size
            return False
        if not values:
            levels.pop()
            continue
        kinds, inner = set(map(type, values)), []
        for kind in kinds:
            alike = values if len(kinds) == 1 else [one for one in values if type(one) is kind]
            length, parts = _of(kind, LENGTHS), _of(kind, PARTS) or _fields(kind)
            most -= length(alike) if length else 0
            if parts:
                inner.append(chain.from_iterable(map(parts, alike)))
        if most < 0:
            return True
        if inner:
            levels.append(chain.from_iterable(inner))
        if len(values) == CHUNK:
            await asyncio.sleep(0)
    return False


def whole(schema: Any) -> bool:
    """Whether values of a type, by pydantic's schema of it, are written as they are: nothing left out or rewritten."""
    text = str(schema)
    return "serializ" not in text and "typed-dict" not in text


@lru_cache(maxsize=1024)
def _fields(kind: type) -> Callable[[Any], Iterable[Any]] | None:
    """What gives the fields of a model or dataclass; None where some may not be written.

    A tool that declares the class above writes the fields of that one alone.
    """
    own = "__pydantic_fields__" if issubclass(kind, BaseModel) else "__dataclass_fields__"
    above = any(getattr(base, own, None) for base in kind.__mro__[1:])
    if not hasattr(kind, own) or above or not whole(getattr(kind, "__pydantic_core_schema__", "")):
        return None
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(getattr(kind, own))
    return lambda value: (getattr(value, name, None) for name in names)


def _of(kind: type, table: dict[type, Callable[[Any], Any]]) -> Callable[[Any], Any] | None:
    return table.get(kind) or next((found for known, found in table.items() if issubclass(kind, known)), None)
