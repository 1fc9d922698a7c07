"""Who plays groups: the seam between a training loop and whatever makes episodes for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llm_gym.core import Group, Task


class Player(Protocol):
    """Plays groups with a policy of its own; a step's groups come from one (`harness.loops.group_player`)."""

    def play(self, tasks: Sequence[Task]) -> list[Group]:
        """A whole group for every task, in the order of tasks; what goes wrong in an episode is in the episode."""
        ...

    def close(self) -> None:
        """Closes environments, and whatever else it holds."""
        ...
