"""Groups that were begun and have not ended: under way, or whole and waiting for the step that trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from llm_gym.core import Group, Task


@dataclass(frozen=True, slots=True)
class Entry:
    """A task that was begun."""

    task: Task
    group: Future[Group] | None
    """Its group, perhaps yet to come; None: another process plays it, or nobody any more."""

    @property
    def whole(self) -> Group | None:
        """Its group, if it is here and sound."""
        done = self.group is not None and self.group.done() and not self.group.cancelled()
        return self.group.result() if done and self.group is not None and self.group.exception() is None else None


class RolloutBuffer:
    """Groups by the numbers of their tasks; they are taken out in that order."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def put(self, number: int, entry: Entry) -> None:
        """A task was begun."""
        self._entries[number] = entry

    def take(self, number: int) -> Entry:
        """Hands one over, and forgets it."""
        return self._entries.pop(number)

    def __iter__(self) -> Iterator[tuple[int, Entry]]:
        """All of them, in the order of numbers."""
        yield from sorted(self._entries.items())

    @property
    def waiting(self) -> int:
        """How many are here and whole."""
        return sum(entry.whole is not None for entry in self._entries.values())

    @property
    def under_way(self) -> int:
        """How many are being played here."""
        return sum(entry.group is not None and not entry.group.done() for entry in self._entries.values())

    def cancel(self) -> None:
        """Gives up what is under way."""
        for entry in self._entries.values():
            if entry.group is not None:
                entry.group.cancel()
