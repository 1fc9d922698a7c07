"""Where every rank of a run is, and whether it lives: so that one that is stuck or dead is named, and nobody waits on.

All through the store in which torchrun's processes find each other, for it outlives a stuck collective.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from llm_gym.concurrency import Thread
from llm_gym.errors import RankError

BEAT = 1.0
"""Seconds between two signs of life of a rank."""
LOST = 30.0
"""Seconds without one after which a rank counts as gone."""
GRACE = 10.0
"""Seconds that a process whose store is gone has to find out and to end by itself."""
HOLDER = "rank 0, or what started the processes,"
"""Who holds the store."""


class Pulse:
    """How long ranks have been silent, as far as has been seen."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[bytes, float]] = {}

    def silence(self, rank: int, beat: bytes) -> float:
        """Seconds since the first look at which `rank` gave this same beat."""
        if rank not in self._last or self._last[rank][0] != beat:
            self._last[rank] = (beat, time.monotonic())
        return time.monotonic() - self._last[rank][1]


class Watch:
    """Knows where every rank is, and whether it lives; all through the store, which outlives a stuck collective.

    Each rank writes `at/<rank>`: how many collectives it has come to, which the last one was, and why it left if it
    did. A thread of it writes `beat/<rank>`, another number every `BEAT` seconds.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.number, self.what, self.over = 0, "the start", threading.Event()
        self._write(None)
        store.set(f"beat/{rank}", "0")
        store.wait([f"{key}/{r}" for r in range(size) for key in ("at", "beat")], datetime.timedelta(seconds=timeout))
        self.thread = Thread(self._beat, name="llm_gym-beat")
        self.thread.start()
        atexit.register(self.stop)

    def wait(self, what: str) -> None:
        """Waits for every rank to come to its next collective.

        Raises:
            RankError: after `timeout` seconds, or at once if a rank has left or died.
        """
        self.number, self.what = self.number + 1, what
        began, pause, pulse = time.monotonic(), 0.0005, Pulse()
        with _answering():
            self._write(None)
            while late := self._behind():
                self._look(late, pulse, what)
                if time.monotonic() - began > self.timeout:
                    names, where = ", ".join(map(str, late)), next(iter(late.values()))["what"]
                    raise RankError(
                        f"rank {names} did not come to {what!r} within {self.timeout:g} s: stuck after {where!r}."
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.05)

    def blame(self, what: str) -> None:
        """After a collective has failed: looks for a rank that has died or left, for as long as it takes to see.

        Raises:
            RankError: there is one.
        """
        began, pulse = time.monotonic(), Pulse()
        while time.monotonic() - began < LOST + 2 * BEAT:
            with _answering():
                self._look(self._others(), pulse, what)
            time.sleep(0.05)

    def stop(self) -> None:
        """No more signs of life; says why if this is before the end."""
        if not self.over.is_set():
            self.over.set()
            error = sys.exception() or getattr(sys, "last_value", None)  # the latter once Python has printed it
            with suppress(RuntimeError):  # whoever holds the store may have left already
                self._write(f"{type(error).__name__}: {error}" if error is not None else "it ended.")
        self.thread.join()
        atexit.unregister(self.stop)  # not before: where the wait was interrupted, it begins again at the exit

    def _write(self, left: str | None) -> None:
        state = {"number": self.number, "what": self.what, "left": left}
        self.store.set(f"at/{self.rank}", json.dumps(state))

    def _others(self) -> dict[int, Any]:
        return {rank: at for rank, at in self._read().items() if rank != self.rank}

    def _behind(self) -> dict[int, Any]:
        return {rank: at for rank, at in self._others().items() if at["number"] < self.number}

    def _look(self, late: Mapping[int, Any], pulse: Pulse, what: str) -> None:
        """Raises if one of the ranks has left, or shows no sign of life."""
        for rank, at in late.items():
            if at["left"]:
                raise RankError(f"rank {rank} has left during {what!r}: {at['left']}")
            if pulse.silence(rank, self.store.get(f"beat/{rank}")) > LOST:
                raise RankError(f"rank {rank} is gone: no sign of life for {LOST:.0f} s, during {what!r}.")

    def _read(self) -> dict[int, Any]:
        states = self.store.multi_get([f"at/{rank}" for rank in range(self.size)])
        return {rank: json.loads(state) for rank, state in enumerate(states)}

    def _beat(self) -> None:
        """Signs of life; without a store to leave them in nobody is left to work with, and the process ends.

        By itself, if its main thread comes to a collective or is in one: then that thread says why, and nothing else
        is said.
        """
        count = 0
        while not self.over.wait(BEAT):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:
                if not self.over.wait(GRACE):
                    self._end()

    def _end(self) -> None:
        """Ends this process, whatever its main thread waits for."""
        print(f"rank {self.rank}: {HOLDER} is gone; stopping.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.over.wait(GRACE):
            os._exit(1)


@contextmanager
def _answering() -> Iterator[None]:
    """A store that does not answer means that its holder is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"{HOLDER} is gone: the store does not answer.") from error
