"""When to try again."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable

FIRST, LONGEST = 0.25, 5.0
"""Seconds before the second try, and before any later one."""


def delay(attempt: int, fraction: float | None = None) -> float:
    """Seconds to wait after failure number `attempt` (from 0): doubled each time, with jitter.

    Between half and all of `min(LONGEST, FIRST * 2**attempt)`, so that requests that failed together do not
    return together ("equal jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        attempt: failures before this one.
        fraction: the jitter, in [0, 1); None: random.
    """
    most = min(LONGEST, FIRST * 2.0 ** min(attempt, 32))
    return most * (0.5 + 0.5 * (random.random() if fraction is None else fraction))


async def tries(until: Callable[[], float] = lambda: math.inf) -> AsyncIterator[int]:
    """Failures so far, 0 at first, for ever; pauses before every try but the first, for `delay`, but not past `until`.

    Args:
        until: when there is no point in waiting any longer, on the monotonic clock; asked before every pause.
    """
    for attempt in itertools.count():
        yield attempt
        await asyncio.sleep(max(min(delay(attempt), until() - time.monotonic()), 0.0))
