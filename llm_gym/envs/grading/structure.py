"""What an answer consists of: lists, sets, tuples, intervals, unions, matrices, relations, and single values.

`parse` turns the plain form (`latex.clean`) into a tree whose leaves are single values; `compare`
walks two of them. It runs in the grading worker, and refuses what is nested deeper than anyone means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llm_gym.envs.grading.latex import closing

MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Value:
    """A single value: a number, an expression, a word."""

    text: str
    about: bool = False
    """It is said to be an approximation."""


@dataclass(frozen=True, slots=True)
class Many:
    """Several answers."""

    kind: Literal["list", "set", "tuple", "union"]
    """`list`: as written, `1, 2`; `set`: order means nothing; `tuple`: in brackets; `union`: joined by cups."""
    items: tuple[Node, ...]
    brackets: str = ""
    """The two brackets of a `tuple`: `()`, `[)`, ...; of a list, `{}` or none."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain `a < b <= c` or `a = b = c`: one more part than signs."""

    parts: tuple[Node, ...]
    signs: tuple[str, ...]


Node = Value | Many | Matrix | Relation

_AND = re.compile(
    r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![a-zA-Z\\{])(?:and|or)(?![a-zA-Z}]))\s*,?\s*"
)
_GLUED_OR = re.compile(r"(?<=\d)or(?=[a-zA-Z]+(?:\(\w\))?=)")
_SIGN = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\in(?![a-z])|\\approx(?![a-z])|[<>=]")
_MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix|array)\}(?:\s*\{[clr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_PM = re.compile(r"\\(?:pm|mp)(?![a-z])")


def parse(text: str, depth: int = 0) -> Node:
    """The tree of a cleaned answer.

    Raises:
        ValueError: it is empty, or nested too deeply.
    """
    text = text.strip()
    if not text or depth > MAX_DEPTH:
        raise ValueError("an empty answer" if not text else "nested too deeply")
    for reader in (_union, _list, _relation, _bracketed, _matrix, _plus_minus):
        if (node := reader(text, depth + 1)) is not None:
            return node
    return Value(text)


def split(text: str, separators: str) -> list[str]:
    """`text` cut at the characters of `separators` that stand outside all brackets."""
    return [text[start:end] for start, end in _cuts(text, [i for i, c in enumerate(text) if c in separators])]


def _cuts(text: str, marks: list[int], lengths: list[int] | None = None) -> list[tuple[int, int]]:
    """The stretches between those of `marks` (each `lengths` long, or 1) that stand outside all brackets."""
    depths = _depths(text)
    stretches, start = [], 0
    for mark, length in zip(marks, lengths or [1] * len(marks), strict=True):
        if mark >= start and depths[mark] == 0:
            stretches.append((start, mark))
            start = mark + length
    return [*stretches, (start, len(text))]


def _depths(text: str) -> list[int]:
    """How many brackets and environments are open at each character."""
    depths, depth = [], 0
    for index, char in enumerate(text):
        if char in ")]}":
            depth -= 1
        if char == "\\" and text.startswith("\\end", index):
            depth -= 1
        depths.append(depth)
        if char in "([{":
            depth += 1
        if char == "\\" and text.startswith("\\begin", index):
            depth += 1
    return depths


def _union(text: str, depth: int) -> Node | None:
    marks = [m.start() for m in re.finditer(r"\\cup(?![a-z])", text)]
    pieces = [text[a:b] for a, b in _cuts(text, marks, [4] * len(marks))]
    if len(pieces) == 1:
        return None
    head = split(pieces[0], "=")  # x = A u B, x in A u B
    pieces[0] = head[-1].rpartition("\\in ")[2] if "\\in " in head[-1] else head[-1]
    return Many("union", tuple(parse(p, depth) for p in pieces))


def _list(text: str, depth: int) -> Node | None:
    if text.startswith("{") and closing(text, 0) == len(text) - 1:
        inner = parse(text[1:-1], depth)  # braces that LaTeX does not show, or those of a set
        return Many("list", inner.items, "{}") if isinstance(inner, Many) and inner.kind == "list" else inner
    text = _GLUED_OR.sub(" or ", text)
    words = list(_AND.finditer(text))
    marked = _cuts(text, [m.start() for m in words], [m.end() - m.start() for m in words])
    separators = ";" if len(split(text, ";")) > 1 else ","
    groups = [[p for p in split(text[a:b], separators) if p.strip()] for a, b in marked]
    if len(groups) > 1 and len(groups[0]) > 1 and len({len(group) for group in groups}) == 1:
        return Many("set", tuple(parse(text[a:b], depth) for a, b in marked))  # p=5, q=2 and p=7, q=2
    pieces = [p for group in groups for p in group]
    if len(pieces) < 2:
        return None
    return Many("set" if len(marked) > 1 else "list", tuple(parse(p, depth) for p in pieces))


def _relation(text: str, depth: int) -> Node | None:
    signs = list(_SIGN.finditer(text))
    spans = _cuts(text, [m.start() for m in signs], [m.end() - m.start() for m in signs])
    if len(spans) == 1:
        return None
    parts = [text[a:b].strip() for a, b in spans]
    found = [text[spans[i][1] : spans[i + 1][0]] for i in range(len(spans) - 1)]
    if found[-1] == "\\approx" and parts[0] and (len(parts) > 2 or not re.fullmatch(r"[a-zA-Z]\w?", parts[0])):
        parts, found = parts[:-1], found[:-1]  # the exact value stands before it
    if "\\in" in found:
        return parse(parts[found.index("\\in") + 1], depth)
    nodes = [parse(part, depth) if part or i else Value("") for i, part in enumerate(parts)]
    if not parts[0] and found[0] in ("=", "\\approx"):  # "= 5"
        first = nodes[1]
        nodes[1] = Value(first.text, about=True) if found[0] != "=" and isinstance(first, Value) else first
        nodes, found = nodes[1:], found[1:]
    if not found:
        return nodes[0]
    return Relation(tuple(nodes), tuple("=" if sign == "\\approx" else sign for sign in found))


_OPEN = re.compile(r"\\\{|\\langle(?![a-z])|[(\[]")


def _bracketed(text: str, depth: int) -> Node | None:
    opening = _OPEN.match(text)
    if opening is None:
        return None
    if opening[0] == "\\langle":
        return _tuple(text[7:].strip().removesuffix("\\rangle"), "()", depth) if text.endswith("\\rangle") else None
    if closing(text, opening.end() - 1) != len(text) - 1:
        return None
    inner = text[opening.end() : -1]
    if opening[0] == "\\{":
        inner = inner.removesuffix("\\").strip()
        if "|" in inner or "\\mid" in inner or ":" in inner:
            return None  # a rule, not a list
        return Many("set", tuple(parse(p, depth) for p in split(inner, ",;"))) if inner else Value("\\emptyset")
    return _tuple(inner, text[0] + text[-1], depth)


def _tuple(inner: str, brackets: str, depth: int) -> Node:
    items = tuple(parse(p, depth) for p in split(inner, ";" if len(split(inner, ";")) > 1 else ","))
    return items[0] if len(items) == 1 else Many("tuple", items, brackets)


def _matrix(text: str, depth: int) -> Node | None:
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\|\\cr(?![a-z])", match[2]) if row.strip()]
    return Matrix(tuple(tuple(parse(cell, depth) for cell in row.split("&")) for row in rows))


def _plus_minus(text: str, depth: int) -> Node | None:
    if _PM.search(text) is None:
        return None
    upper = _PM.sub(lambda m: "+" if m[0] == "\\pm" else "-", text)
    lower = _PM.sub(lambda m: "-" if m[0] == "\\pm" else "+", text)
    return Many("set", (parse(upper.strip().removeprefix("+"), depth), parse(lower, depth)))
