"""What every adapter of foreign code needs: seeds by split, and random generators that no other environment moves."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from llm_gym.env import TextEnv
from llm_gym.errors import ConfigError, unknown

ROOM = 2**30
"""Seeds of each split."""
STARTS = {"train": 0, "test": ROOM}
"""Split -> its first seed. A generator may draw item i of seed s from s + i: no two splits share a sum."""
_one_at_a_time = threading.RLock()


class GlobalRandom:
    """The global generators of `random` and `numpy.random` as one environment sees them.

    `with own:` puts the environment's states in the place of the process's, and these back afterwards, so that foreign
    code which draws from them depends on nothing but `seed`, and moves nothing. Threads that use this class wait for
    each other; one that draws from the global generators without it, at that moment, draws from the environment's.

    >>> own, before = GlobalRandom(), random.getstate()
    >>> own.seed(7)
    >>> with own:
    ...     first = random.random()
    >>> first == random.Random(7).random(), random.getstate() == before
    (True, True)
    """

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Sets both generators, for the next `with`; not inside one."""
        self._own: tuple[Any, Any] = (random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state())

    def __enter__(self) -> None:
        _one_at_a_time.acquire()
        self._others = _swap(self._own)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own = _swap(self._others)
        _one_at_a_time.release()


def _swap(states: tuple[Any, Any]) -> tuple[Any, Any]:
    """Sets both generators; returns their former states."""
    former = random.getstate(), np.random.get_state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    return former


class ForeignEnv(TextEnv):
    """Base of the adapters.

    Args:
        split: `train`, or `test`: problems of other seeds, which training never draws.
    """

    eval_args: ClassVar[Mapping[str, Any]] = {"split": "test"}

    def __init__(self, *, split: str = "train", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if split not in STARTS:
            raise ConfigError(unknown("split", split, STARTS))
        self.split = split
        self.globals = GlobalRandom()

    def draw_seed(self, room: int = ROOM) -> int:
        """The foreign seed of this episode, one of `room` of the split (the row asked for, if one is).

        The global generators, as this environment sees them, begin there.
        """
        seed = STARTS[self.split] + self.draw_task(room)
        self.globals.seed(seed)
        return seed
