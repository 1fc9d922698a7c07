"""Values written out in text: JSON, and a small reader of literals (Python's, JSON's, Gemma's).

Both take time linear in the length, bound the nesting and know no infinity. `ast.literal_eval` reads Python's
literals alone, and hostile text makes the interpreter's own parser run out of stack or memory.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 40
"""Lists and dicts may be nested so deep."""
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]{0,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][-+]?\d{1,4})?")
_WORD = re.compile(r"[^\W\d][\w.-]*")
_RAW = ('<|"|>', "<escape>")
"""Quotes between which nothing is escaped: Gemma 4's, FunctionGemma's."""
_QUOTES = (*_RAW, '"""', "'''", '"', "'")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([0-7]{1,3})|(.))", re.S)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends; line breaks inside strings are let pass.

    Raises:
        ValueError: there is none, or it is nested too deeply; the message is for the model.
    """
    try:
        value, stop = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        near = text[max(start, error.pos - 10) : error.pos + 10]
        raise ValueError(f"{error.msg} at character {error.pos - start}, near {near!r}.") from None
    except RecursionError:
        value, stop = None, -1
    if stop < 0 or _deeper(value, DEEPEST):
        raise ValueError(f"it has more than {DEEPEST} levels of nesting.")
    return value, stop


def loads(text: str) -> Any:
    """The one JSON value that `text` is.

    Raises:
        ValueError: it is none, or more.
    """
    value, stop = decode(text, len(text) - len(text.lstrip()))
    if text[stop:].strip():
        raise ValueError(f"there is more behind it: {text[stop:].strip()[:20]!r}.")
    return value


class LiteralError(ValueError):
    """The text is no literal; the message says what was expected and where."""


class Literals:
    """Reads literals from `text`, starting at `at`, which moves on."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text, self.at = text, at

    def value(self, depth: int = 0) -> Any:
        """The next literal: a string, number, list, tuple (as a list), dict, true, false or null.

        Raises:
            LiteralError: there is none.
        """
        if depth > DEEPEST:
            raise self.error(f"at most {DEEPEST} levels of nesting")
        if self.skip("["):
            return self.items("]", depth)
        if self.skip("("):
            return self.items(")", depth)
        if self.skip("{"):
            return self.pairs("}", ":", depth)
        for quote in _QUOTES:
            if self.text.startswith(quote, self.at):
                return self.string(quote)
        if number := _NUMBER.match(self.text, self.at):
            self.at = number.end()
            return self.number(number[0])
        word = self.word()
        if word not in _WORDS:
            raise self.error("a value", -len(word))
        return _WORDS[word]

    def items(self, end: str, depth: int = 0) -> list[Any]:
        """The values up to `end`, separated by commas."""
        found: list[Any] = []
        while not self.skip(end):
            if found:
                self.want(",", end)
                if self.skip(end):
                    break
            found.append(self.value(depth + 1))
        return found

    def pairs(self, end: str, sign: str, depth: int = 0) -> dict[str, Any]:
        """The `key sign value` pairs up to `end`, separated by commas; keys may stand without quotes."""
        found: dict[str, Any] = {}
        while not self.skip(end):
            if found:
                self.want(",", end)
                if self.skip(end):
                    break
            key = self.key()
            if key in found:
                raise self.error(f"{key!r} only once", -len(key))
            self.want(sign)
            found[key] = self.value(depth + 1)
        return found

    def key(self) -> str:
        """A quoted string or a bare word."""
        self.skip("")
        quote = next((q for q in _QUOTES if self.text.startswith(q, self.at)), None)
        return self.string(quote) if quote else self.word()

    def word(self) -> str:
        """A bare word, dots and dashes included."""
        self.skip("")
        word = _WORD.match(self.text, self.at)
        if word is None:
            raise self.error("a name or a value")
        self.at = word.end()
        return word[0]

    def string(self, quote: str) -> str:
        """A string that starts and ends with `quote`; line breaks may stand in any."""
        start = self.at + len(quote)
        stop = start
        while True:
            stop = self.text.find(quote, stop)
            if stop < 0:
                raise self.error(f"a closing {quote}")
            if quote in _RAW or not self._escaped(start, stop):
                break
            stop += 1
        self.at = stop + len(quote)
        body = self.text[start:stop]
        return body if quote in _RAW or "\\" not in body else _unescaped(body)

    def number(self, text: str) -> int | float:
        """An int, or a float that is finite."""
        plain = text.replace("_", "")
        if plain.lstrip("+-").isdigit():
            return int(plain)
        try:
            return _float(plain)
        except ValueError:
            raise self.error("a finite number", -len(text)) from None

    def skip(self, text: str) -> bool:
        """Whether `text` comes next, white space apart; if so it is passed over."""
        space = _SPACE.match(self.text, self.at)
        assert space is not None
        self.at = space.end()
        if not self.text.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def ends(self, text: str) -> bool:
        """Whether `text` comes next, which is passed over, or nothing if it is empty."""
        return self.skip(text) and (bool(text) or self.at == len(self.text))

    def want(self, *texts: str) -> None:
        """Passes over the first of `texts`.

        Raises:
            LiteralError: something else comes next.
        """
        if not self.skip(texts[0]):
            raise self.error(" or ".join(map(repr, texts)))

    def error(self, wanted: str, offset: int = 0) -> LiteralError:
        """What was expected and what is there."""
        at = self.at + offset
        near = self.text[at : at + 20]
        return LiteralError(f"want {wanted}, got {near!r}" if near else f"want {wanted}, but the text ends")

    def _escaped(self, start: int, at: int) -> bool:
        """Whether an odd number of backslashes stands before `at`."""
        first = at
        while first > start and self.text[first - 1] == "\\":
            first -= 1
        return (at - first) % 2 == 1


def _unescaped(body: str) -> str:
    """The string that a literal's body stands for; unknown escapes stay as they are, as in Python."""
    pairs = _ESCAPE.sub(_character, body)
    return pairs.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if "\\u" in body else pairs


def _character(escape: re.Match[str]) -> str:
    code, long, byte, octal, other = escape.groups()
    if other is not None:
        return _ESCAPES.get(other, other if other in "\\'\"/" else "\\" + other)
    number = int(octal, 8) if octal else int(code or long or byte, 16)
    return chr(number) if number < 0x110000 else "\ufffd"


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and dicts are nested more than `most` levels deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            item
            for parent in level
            if isinstance(parent, list | dict)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number.")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large.")
    return value


_DECODER = json.JSONDecoder(strict=False, parse_constant=_constant, parse_float=_float)
