"""Sessions that nobody opened: of people's own tools, one for each API key, until nothing is asked for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llm_gym.serving.chat_requests import Refused
from llm_gym.serving.chat_sessions import ChatSession

MOST = 1024
"""Sessions at once."""
FULL = 1000
"""Replies of a session after which the next request begins a new one: all of its tokens are held."""


class Visitors:
    """Makes, keeps and ends such sessions; used inside the door's event loop, but for `close`.

    Args:
        make: the session of an API key; None: it is refused.
        idle: seconds without a request after which a session ends.
        ended: is told of a session that has ended.
    """

    def __init__(
        self, make: Callable[[str], ChatSession | None], *, idle: float, ended: Callable[[ChatSession], None]
    ) -> None:
        self._make, self._idle, self._ended = make, idle, ended
        self._sessions: dict[str, tuple[ChatSession, asyncio.TimerHandle]] = {}

    def session(self, key: str) -> ChatSession | None:
        """The session of a key, which lasts from now.

        Raises:
            Refused: too many are open.
        """
        session, timer = self._sessions.get(key, (None, None))
        if session is not None and session.turns >= FULL and not session.busy:
            self._end(key)
            session = timer = None
        if session is None:
            if len(self._sessions) >= MOST:
                raise Refused(f"All {MOST} sessions are in use.", status=429, code="too_many_sessions")
            session = self._make(key)
        if timer is not None:
            timer.cancel()
        if session is not None:
            self._sessions[key] = session, self._timer(key)
        return session

    def close(self) -> None:
        """Ends all of them, once the loop has."""
        for key in list(self._sessions):
            self._end(key)

    def _timer(self, key: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._idle, self._end_idle, key)

    def _end_idle(self, key: str) -> None:
        session, _ = self._sessions[key]
        if session.busy:  # a completion may take longer
            self._sessions[key] = session, self._timer(key)
        else:
            self._end(key)

    def _end(self, key: str) -> None:
        session, timer = self._sessions.pop(key)
        timer.cancel()
        session.close()
        self._ended(session)
