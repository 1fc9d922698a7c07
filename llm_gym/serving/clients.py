"""The openai client of an agent, and the connections that the clients of one event loop share."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from llm_gym.errors import SettingError

if TYPE_CHECKING:
    from llm_gym.serving.chat import Endpoint

_connections: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""By event loop, an HTTP client and what closes it: to make one takes longer than a small model's reply."""


def openai_client(endpoint: Endpoint) -> Any:
    """An `openai.AsyncOpenAI` for an endpoint.

    No time-out of its own, since the episode has one, and no second try: what failed here is the policy.

    Raises:
        SettingError: the package openai is not installed.
    """
    try:
        import httpx
        import openai
    except ModuleNotFoundError as error:
        raise SettingError("endpoint.client(): needs the package openai; pip install 'llm-gym[agents]'.") from error
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        http = None
    else:
        http, _ = _connections.get(loop, (None, None))
        if http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
            http = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)
            _connections[loop] = http, http.aclose
            http.aclose = _left_open  # type: ignore[method-assign]  # one agent's end is not that of the others
    return openai.AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=http, max_retries=0, timeout=None
    )


async def close_clients() -> None:
    """Closes the connections of the running event loop."""
    _, close = _connections.pop(asyncio.get_running_loop(), (None, None))
    if close is not None:
        await close()


async def _left_open() -> None:
    """What closing does to connections that others use."""
