"""One HTTP server: JSON in and out, and what a failure means."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from llm_gym.errors import PolicyError

KEPT = 2.0
"""Seconds that an idle connection is used again: less than the 5 after which vLLM closes it. A request that crosses
that end on its way has no answer, and the server seems lost."""
PIECE = 1 << 20
"""Bytes of a file that are sent at a time."""
PASSING = frozenset({408, 425, 429})
"""Client errors that another try may not meet: timeouts and rate limits."""


class RemoteError(PolicyError):
    """A request that failed; `status` is None if there was no answer, or none that can be read."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether another try may succeed: no answer, a server's error (5xx) or a rate limit; never our own mistake."""
        return self.status is None or self.status >= 500 or self.status in PASSING


class Remote:
    """A server at `url`, reached through connections that are kept; use it inside one event loop."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, proxies: bool = False) -> None:
        self.url = url.rstrip("/")
        self._headers, self._proxies = dict(headers or {}), proxies
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        seconds: float | None = None,
        plain: bool = False,
    ) -> Any:
        """The answer's JSON, or None for an empty answer; cancelling closes the connection.

        Args:
            method: `GET`, `POST` or `DELETE`.
            path: behind the server's URL.
            body: sent as JSON unless None.
            params: the query string.
            seconds: most time for the whole exchange; None: no limit (a completion takes what it takes).
            plain: the answer is text, not JSON, and returned as it is.

        Raises:
            RemoteError: no answer in time, an HTTP status of 400 or more, or an answer that is no JSON.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=10)
            async with self._open().request(method, self.url + path, json=body, params=params, timeout=timeout) as got:
                text = await self._text(got, path)
        except TimeoutError as error:
            raise RemoteError(f"{self.url} did not answer in time") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RemoteError(f"{self.url}: {type(error).__name__}: {error}") from error
        return text if plain else self._json(text, path)

    async def upload(
        self, path: str, file: Path, *, params: Mapping[str, str] | None = None, stall: float
    ) -> tuple[Any, str]:
        """Sends a file as the body of a PUT: the answer's JSON, and the SHA-256 of what was sent.

        The body follows once the server asks for it, so that one that is refused is not sent at all.

        Args:
            path: behind the server's URL.
            file: read as it goes.
            params: the query string.
            stall: seconds in which the next `PIECE` must have gone.

        Raises:
            RemoteError: as `call`, or nothing moved for `stall` seconds.
        """
        loop, digest = asyncio.get_running_loop(), hashlib.sha256()
        headers = {"Content-Length": str(file.stat().st_size), "Content-Type": "application/octet-stream"}
        try:
            async with asyncio.timeout(stall) as limit:
                body = _pieces(file, digest.update, lambda: limit.reschedule(loop.time() + stall))
                options: dict[str, Any] = {"data": body, "params": params, "headers": headers, "expect100": True}
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
                async with self._open().put(self.url + path, timeout=timeout, **options) as got:
                    text = await self._text(got, path)
        except TimeoutError as error:
            raise RemoteError(f"{self.url} took nothing more of {file.name} for {stall:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RemoteError(
                f"{self.url}: {file.name} did not get through: {type(error).__name__}: {error}"
            ) from error
        return self._json(text, path), digest.hexdigest()

    async def download(self, path: str, file: Path, *, header: str) -> str:
        """Writes the body of a GET into a file as it comes; returns a header of the answer.

        Raises:
            RemoteError: as `call`.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
            async with self._open().get(self.url + path, timeout=timeout) as got:
                if got.status >= 400:
                    await self._text(got, path)
                with file.open("wb") as opened:
                    async for piece in got.content.iter_chunked(PIECE):
                        opened.write(piece)
                return got.headers[header]
        except (TimeoutError, aiohttp.ClientError, OSError, KeyError) as error:
            raise RemoteError(f"{self.url}{path} did not get through: {type(error).__name__}: {error}") from error

    async def _text(self, got: aiohttp.ClientResponse, path: str) -> str:
        text = await got.text()
        if got.status >= 400:
            raise RemoteError(f"{self.url}{path} answered {got.status}: {message(text)}", got.status)
        return text

    def _json(self, text: str, path: str) -> Any:
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise RemoteError(f"{self.url}{path} answered what is no JSON: {text[:80]!r}") from error

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limits: as many requests at once as there are episodes; the engine queues them better.
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=KEPT)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, trust_env=self._proxies)
        return self._session


async def _pieces(file: Path, seen: Callable[[bytes], None], moved: Callable[[], None]) -> AsyncIterator[bytes]:
    """A file's bytes; `moved` is called whenever those before have gone."""

    def read() -> bytes:
        piece = opened.read(PIECE)
        seen(piece)
        return piece

    with file.open("rb") as opened:
        while piece := await asyncio.to_thread(read):
            moved()
            yield piece
    moved()


def message(text: str) -> str:
    """What an error's body says, in one line: its message if it is JSON of a known form."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if key in found), str(found))
    return " ".join(str(found).split())[:500] or "nothing"
