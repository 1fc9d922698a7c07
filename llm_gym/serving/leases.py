"""Tasks that others play: offered, leased for a while, and ended once, by the first whole group that is sound.

Pure bookkeeping: no clock and no network of its own. A lease that is not renewed in time is over, and its task is
offered again; so is that of a group which was refused. What was accepted may be posted again, and changes nothing.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llm_gym.core import Episode, Group, Task

REMEMBERED = 4096
"""Leases that have ended which are still told apart from those that never were."""
PATIENCE = 3
"""Groups of a player that may be refused before it is given no more tasks."""


class NotAccepted(Exception):
    """A post or a question that is refused; says why, and with which HTTP status."""

    def __init__(self, text: str, status: int = 409) -> None:
        super().__init__(text)
        self.status = status


@dataclass(eq=False, slots=True)
class Offer:
    """A group to be played."""

    task: Task
    how: Mapping[str, Any]
    """`group_size`, `seed`, `sampling`: as `Drivers.play_group` takes them."""
    group: Future[Group] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Lease:
    """An offer in the hands of a player."""

    id: str
    offer: Offer
    player: str
    version: int
    """Of the weights when it was given out: the group's tokens are of this version or a later one."""
    until: float


class Board:
    """Offers and leases; used by any thread.

    Args:
        seconds: how long a lease lasts unless it is renewed.

    >>> board = Board(seconds=60)
    >>> future = board.offer(Task(0, seed=7), {"group_size": 0})
    >>> lease = board.lease("one", version=3, now=0.0)
    >>> board.post(lease.id, [], check=lambda lease, episodes: None, now=1.0), future.result().task.seed
    (True, 7)
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.refused: Counter[str] = Counter()
        """Refused groups by player."""
        self.accepted = 0
        """Groups."""
        self.reason = ""
        """Why the last group was refused."""
        self._offers: deque[Offer] = deque()
        self._leases: dict[str, Lease] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def offer(self, task: Task, how: Mapping[str, Any]) -> Future[Group]:
        """Puts up a task; cancelling the future takes it away."""
        made = Offer(task, how)
        with self._lock:
            self._offers.append(made)
        return made.group

    def lease(self, player: str, *, version: int, now: float) -> Lease | None:
        """The oldest task that nobody plays; None: there is none.

        Raises:
            NotAccepted: too much of this player's was refused.
        """
        with self._lock:
            if self.refused[player] >= PATIENCE:
                raise NotAccepted(f"{PATIENCE} groups of player {player!r} were refused; the last: {self.reason}", 403)
            self._expire(now)
            while self._offers:
                offer = self._offers.popleft()
                if not offer.group.cancelled():
                    made = Lease(uuid.uuid4().hex, offer, player, version, now + self.seconds)
                    self._leases[made.id] = made
                    return made
            return None

    def renew(self, lease: str, *, now: float) -> None:
        """Lets a lease last from now.

        Raises:
            NotAccepted: it is over.
        """
        with self._lock:
            self._expire(now)
            held = self._held(lease)
            self._leases[lease] = Lease(held.id, held.offer, held.player, held.version, now + self.seconds)

    def post(
        self,
        lease: str,
        episodes: Sequence[Episode],
        *,
        check: Callable[[Lease, Sequence[Episode]], str | None],
        now: float,
    ) -> bool:
        """Takes a whole group.

        Args:
            lease: its id.
            episodes: the group.
            check: says what is wrong with it, or None.
            now: the time.

        Returns:
            Whether it is new; False: it was accepted before.

        Raises:
            NotAccepted: the lease is over, or the group is not sound.
        """
        with self._lock:
            self._expire(now)
            if self._ended.get(lease) == "accepted":
                return False
            held = self._held(lease)
        wrong = check(held, episodes)
        with self._lock:
            if self._ended.get(lease) == "accepted":
                return False
            self._held(lease)
            self._end(held, "refused" if wrong else "accepted")
            if wrong:
                self.refused[held.player] += 1
                self.reason = wrong
                self._offers.appendleft(held.offer)
                raise NotAccepted(wrong, 422)
            self.accepted += 1
            if held.offer.group.set_running_or_notify_cancel():
                held.offer.group.set_result(Group(held.offer.task, tuple(episodes)))
            return True

    def status(self, now: float) -> dict[str, Any]:
        """What waits, what is being played, and by whom."""
        with self._lock:
            self._expire(now)
            players = Counter(lease.player for lease in self._leases.values())
            counts = {"waiting": len(self._offers), "leased": len(self._leases), "accepted": self.accepted}
            return {**counts, "players": dict(players), "refused": dict(self.refused), "reason": self.reason}

    def _held(self, lease: str) -> Lease:
        if lease not in self._leases:
            how = self._ended.get(lease, "unknown")
            raise NotAccepted(f"The lease is {'over' if how == 'expired' else how}; its task may be played elsewhere.")
        return self._leases[lease]

    def _expire(self, now: float) -> None:
        for lease in [lease for lease in self._leases.values() if lease.until < now]:
            self._end(lease, "expired")
            self._offers.appendleft(lease.offer)

    def _end(self, lease: Lease, how: str) -> None:
        del self._leases[lease.id]
        self._ended[lease.id] = how
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
