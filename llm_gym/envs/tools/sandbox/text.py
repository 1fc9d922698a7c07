"""What a program wrote, as text that is safe to show to a model."""

from __future__ import annotations

import os
import re

# CSI, OSC and the two-byte escapes of ECMA-48.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    r"""`text` without terminal escapes; other control characters and lone surrogates are shown as escapes.

    >>> clean("\x1b[31mred\x1b[0m a\x00b\n10%\r20%\r\n")
    'red a\\x00b\n20%\n'
    """
    text = _ANSI.sub("", text).replace("\r\n", "\n")
    if "\r" in text:  # a terminal would write over the line
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clip(text: str, most: int, missing: int = 0) -> str:
    """`text`, or its head and its tail where it is longer than `most` characters.

    Args:
        text: what there is.
        most: characters to keep.
        missing: characters already left out in the middle of `text`.
    """
    if len(text) <= most and not missing:
        return text
    keep = min(most, len(text)) // 2
    left_out = len(text) - 2 * keep + missing
    return f"{text[:keep]}\n[... {left_out:,} characters left out ...]\n{text[len(text) - keep :]}"


def read(fd: int, start: int, most: int) -> str:
    """The clean, clipped text of an open file from byte `start` on; whatever the file holds, the work is bounded."""
    end = os.fstat(fd).st_size
    room = 4 * most
    if end - start <= 2 * room:
        return clip(clean(_decode(fd, start, end)), most)
    head, tail = clean(_decode(fd, start, start + room)), clean(_decode(fd, end - room, end))
    kept = head[:most] + tail[-most:]
    return clip(kept, most, len(head) + len(tail) - len(kept) + end - start - 2 * room)


def _decode(fd: int, start: int, end: int) -> str:
    return os.pread(fd, max(0, end - start), start).decode("utf-8", "replace")
