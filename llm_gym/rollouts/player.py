"""Who plays groups: the seam between a training loop and whatever makes episodes for it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from llm_gym.core import Group, Task


class Player(Protocol):
    """Plays groups with a policy of its own; a step's groups come from one (`harness.loops.group_player`).

    What goes wrong in an episode is in the episode; an exception is what every episode would run into.
    """

    @property
    def version(self) -> int:
        """Of the weights that sample now."""
        ...

    def play(self, tasks: Sequence[Task]) -> list[Group]:
        """A whole group for every task, in the order of tasks."""
        ...

    def begin(self, task: Task) -> Future[Group]:
        """Begins a group, and does not wait for it; cancelling the future gives it up. Groups begun first go first."""
        ...

    def wait(self, begun: Sequence[Future[Group]]) -> list[Group]:
        """Waits for groups that were begun, and shows how far they are."""
        ...

    def close(self) -> None:
        """Closes environments, and whatever else it holds."""
        ...
