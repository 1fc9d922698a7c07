"""A thread that can be waited for again after Ctrl-C has interrupted the first wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Thread(threading.Thread):
    """A daemon thread; a `join` that was interrupted may be repeated, and waits as the first one did.

    `threading.Thread.join` before Python 3.13 takes the thread for ended once a `KeyboardInterrupt` has come out of
    it: every later `join` returns at once, and a thread inside torch while the interpreter is taken down aborts the
    process.

    >>> thread = Thread(print, name="greeter", args=("hello",))
    >>> thread.start(); thread.join()
    hello
    """

    def __init__(self, target: Callable[..., object], *, name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._begun, self._over = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begins. Interrupted by Ctrl-C, it lets the thread begin first: who started it can then end it."""
        try:
            super().start()
        except KeyboardInterrupt:
            self._begun.wait(1.0)
            raise

    def run(self) -> None:
        """Runs the target."""
        self._begun.set()
        try:
            super().run()
        finally:
            self._over.set()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end, for at most `timeout` seconds."""
        if self._over.wait(timeout):
            super().join()
