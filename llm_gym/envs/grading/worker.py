"""The grading worker: `python -m llm_gym.envs.grading.worker`, one case at a time over its pipes.

A frame is a 4-byte length and that much JSON. The worker sends `"ready"` once sympy is warm, then
answers each case. It ends when its input does; should its parent die while it computes, the alarm
that it sets for every case kills it (the kernel does, so no computation can hold it off).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

GRACE = 2.0
"""Seconds after the parent's deadline at which the worker's own alarm rings."""


def main() -> None:
    """Serves until the input ends."""
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    from llm_gym.envs.grading.compare import compare

    compare(r"\frac{\sqrt{2}}{2} x^2", r"\frac{x^2}{\sqrt 2}")  # the first parse builds tables
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    write(sink, "ready")
    while (case := read(source)) is not None:
        gold, answer, ordered, deadline = case
        signal.setitimer(signal.ITIMER_REAL, deadline + GRACE)
        try:
            write(sink, compare(gold, answer, ordered=ordered))
        except MemoryError:
            return  # the parent sees the end of the pipe
        except Exception:  # math-verify and sympy raise anything at all on what they cannot read
            write(sink, "unparsed")
        signal.setitimer(signal.ITIMER_REAL, 0)


def write(sink: BinaryIO, value: object) -> None:
    """Sends one frame."""
    body = json.dumps(value).encode()
    sink.write(struct.pack(">I", len(body)) + body)
    sink.flush()


def read(source: BinaryIO) -> list[Any] | None:
    """Receives one frame; None at the end of the input."""
    head = source.read(4)
    if len(head) < 4:
        return None
    case: list[Any] = json.loads(source.read(*struct.unpack(">I", head)))
    return case


if __name__ == "__main__":
    main()
