"""Which tasks may begin: numbers, and the bound on how old a token may be when it is trained on. No I/O.

Tasks are numbered, begin in the order of their numbers, and end in it: a step trains on the next ones that are whole,
and waits for the oldest. None is dropped for its age, so that long episodes are trained on as often as short ones.

Let the step that trains next be s, `missing` the numbers that it takes at least, and `head` the number that ends next.
Every step takes at least `per_step` numbers, so n >= head + missing is trained on in step
s + 1 + (n - head - missing) // per_step or earlier. If it begins now, with weights of version v, its oldest token is
then at most `max_staleness` updates old if n < head + missing + per_step * (max_staleness - (s - v)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Scheduler:
    """Numbers tasks, and says which may begin.

    >>> scheduler = Scheduler(per_step=4, max_staleness=1)
    >>> list(scheduler.begin(step=0, version=0))
    [0, 1, 2, 3, 4, 5, 6, 7]
    >>> scheduler.end(4)  # they are trained on in step 0, and the weights are still those of version 0
    >>> list(scheduler.begin(step=1, version=0))
    []
    >>> list(scheduler.begin(step=1, version=1))
    [8, 9, 10, 11]
    """

    per_step: int
    """Groups that a step trains on."""
    max_staleness: int
    """Updates that a token may be old when it is trained on."""
    head: int = 0
    """The number that ends next: those before it were trained on, filtered or failed, each once."""
    cursor: int = 0
    """The number that begins next."""

    def begin(self, step: int, version: int, *, missing: int | None = None, needed: float = math.inf) -> range:
        """The numbers that begin now, none of them again later.

        Args:
            step: the step that trains next, from 0.
            version: of the weights that sample now, at most `step`.
            missing: numbers that this step still takes, at least; None: `per_step`.
            needed: most numbers that may still end in the run.
        """
        missing = self.per_step if missing is None else missing
        ahead = min(missing + self.per_step * (self.max_staleness - (step - version)), needed)
        most = self.head + int(ahead)
        begun = range(self.cursor, max(self.cursor, most))
        self.cursor = begun.stop
        return begun

    def end(self, count: int) -> None:
        """The next `count` numbers have ended.

        Raises:
            ValueError: so many have not begun.
        """
        if self.head + count > self.cursor:
            raise ValueError(f"end: {count} tasks from number {self.head} on, but number {self.cursor} has not begun.")
        self.head += count
