"""Tracebacks as text: short however deep the call or long the chain, and whatever the exception's own methods do."""

from __future__ import annotations

import linecache
from collections import deque
from collections.abc import Callable
from types import TracebackType

FIRST, LAST = 8, 12
"""Frames shown of a deep stack: the outermost and the innermost."""
CHAIN, GROUP, DEEP = 5, 5, 3
"""Exceptions shown of a chain, of one group, and groups within each other."""
CAUSED = "\nThe above exception was the direct cause of the following exception:\n"
MEANWHILE = "\nDuring handling of the above exception, another exception occurred:\n"

Place = Callable[[str, int], str]
"""How a file and a line of it are called."""


def safely(value: object) -> str:
    """str(value), whatever its class does."""
    try:
        return str(value)
    except BaseException as error:
        return f"<{type(value).__name__} whose str() raises {type(error).__name__}>"


def describe(value: BaseException, trace: TracebackType | None, skip: int, place: Place, deep: int = 0) -> str:
    """The text of an exception, after those that caused it.

    Args:
        value: the exception.
        trace: where it was raised.
        skip: frames to leave out at the top, where there are more.
        place: names places.
        deep: groups around it.
    """
    parts, seen = [_one(value, trace, skip, place, deep)], {id(value)}
    while len(seen) < CHAIN:
        cause = value.__cause__
        before = cause if cause is not None or value.__suppress_context__ else value.__context__
        if before is None or id(before) in seen:
            break
        seen.add(id(before))
        parts += [MEANWHILE if cause is None else CAUSED, _one(before, before.__traceback__, 0, place, deep)]
        value = before
    return "".join(reversed(parts))


def _one(value: BaseException, trace: TracebackType | None, skip: int, place: Place, deep: int) -> str:
    words = safely(value)
    lines = ["Traceback (most recent call last):", *_frames(trace, skip, place)] if trace else []
    lines.append(f"{type(value).__name__}: {words}" if words else type(value).__name__)
    notes = getattr(value, "__notes__", ())
    lines += [safely(note) for note in notes] if isinstance(notes, list | tuple) else []
    if isinstance(value, BaseExceptionGroup) and deep < DEEP:
        for inner in value.exceptions[:GROUP]:
            lines += [f"  | {line}" for line in describe(inner, inner.__traceback__, 0, place, deep + 1).splitlines()]
        if len(value.exceptions) > GROUP:
            lines.append(f"  | [... {len(value.exceptions) - GROUP:,} more exceptions ...]")
    return "\n".join(lines) + "\n"


def _frames(trace: TracebackType | None, skip: int, place: Place) -> list[str]:
    """The lines of the frames; a million of them take a tenth of a second."""
    frames: list[TracebackType] = []
    last: deque[TracebackType] = deque(maxlen=LAST)
    count = 0
    while trace is not None:
        if count < skip + FIRST:
            frames.append(trace)
        else:
            last.append(trace)
        count += 1
        trace = trace.tb_next
    lines = [line for frame in frames[skip if count > skip else 0 :] for line in _frame(frame, place)]
    if left_out := count - len(frames) - len(last):
        lines.append(f"  [... {left_out:,} frames left out ...]")
    return lines + [line for frame in last for line in _frame(frame, place)]


def _frame(frame: TracebackType, place: Place) -> list[str]:
    code, number = frame.tb_frame.f_code, frame.tb_lineno
    inside = "" if code.co_name == "<module>" else f" in {code.co_name}"
    linecache.checkcache(code.co_filename)
    line = linecache.getline(code.co_filename, number, frame.tb_frame.f_globals).strip()
    return [f"  {place(code.co_filename, number)}{inside}", *([f"    {line}"] if line else [])]
