"""Sessions with MCP servers, those of one set in one event loop, for environments that block.

Every await has a deadline that is kept from outside too, so a server that is silent, prints garbage or dies ends a
call as an error and never as a hang. A server started by us runs on a leash (see `supervisor.py`), in a folder of its
own; what one sends is bounded before it comes into the loop, there or in `http.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llm_gym.concurrency import Loop
from llm_gym.envs.tools.mcp.results import LONGEST, TOO_LONG, message_size, not_mcp, public_names, result_text
from llm_gym.errors import ToolError, ToolFailure

T = TypeVar("T")
MARGIN, CLOSING, PING = 5.0, 10.0, 10.0
"""Seconds beyond a deadline after which the loop itself is not waited for; those in which a session must be closed;
those in which a server that somebody else runs should say that it knows a session."""
LEASH = Path(__file__).with_name("supervisor.py")
SCRATCH = "{scratch}"
"""Stands for the session's own folder in a server's arguments, environment and directory."""


class Session:
    """One session with each server of a set; its methods run in the loop.

    Args:
        servers: name -> entry of an `mcpServers` file (`command`, `args`, `env`, `cwd`, or `url`, `headers`), a
            server object of this process, or a function that makes one for each session.
        start_timeout: seconds in which all of them must have started.
        tools: the `tools` of an earlier session with these servers; None: ask the servers.
    """

    def __init__(self, servers: Mapping[str, Any], start_timeout: float, tools: Mapping[str, Any] | None = None):
        self._servers, self._start_timeout = servers, start_timeout
        self._clients: dict[str, Any] = {}
        self._scratch: Path | None = None
        self._starting: asyncio.Task[Any] | None = None
        self.started: Future[None] | None = None
        """Where `start` is under way or done."""
        self.tools: dict[str, tuple[str, Any]] = dict(tools or {})
        """Name shown to the model -> (server, MCP tool)."""
        self.lost = False
        """Whether it was found to be broken."""

    async def start(self) -> None:
        """Starts the servers and lists their tools.

        Raises:
            ToolFailure: one of them did not start in time, or not at all.
        """
        self._starting, name = asyncio.current_task(), ""
        try:
            async with asyncio.timeout(self._start_timeout):
                listed = {}
                for name, entry in self._servers.items():
                    client = self._clients[name] = self._client(name, entry)
                    await client.__aenter__()
                    listed[name] = () if self.tools else await client.list_tools()
        except Exception as error:
            why = f"did not start in {self._start_timeout:g} s" if isinstance(error, TimeoutError) else "did not start"
            details = "; ".join(filter(None, (_words(error), self._last_words(name))))
            await self._end()
            raise ToolFailure(f"MCP server {name!r} {why}: {details or type(error).__name__}.") from error
        self.tools = self.tools or public_names(listed)

    async def call(self, name: str, arguments: dict[str, Any], timeout: float) -> Any:
        """The result of a tool, a `CallToolResult`.

        Raises:
            ToolError: there is no result in time, or none that MCP knows.
            ToolFailure: the server is gone, or no longer knows the session.
        """
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED, PARSE_ERROR, REQUEST_TIMEOUT
        from pydantic import ValidationError

        server, tool = self.tools[name]
        client = self._clients.get(server)
        if client is None:
            raise ToolFailure(f"MCP server {server!r} is gone: its session was ended.")
        late = f"{name} gave no result within {timeout:g} seconds."
        try:
            async with asyncio.timeout(timeout + 1):
                result = await client.call_tool_mcp(tool.name, arguments, timeout=timeout)
        except TimeoutError:
            raise ToolError(late) from None
        except MCPError as error:
            if error.error.code == REQUEST_TIMEOUT:
                raise ToolError(late) from None
            if error.error.code not in (CONNECTION_CLOSED, PARSE_ERROR):
                raise ToolError(str(error.error.message)) from None
            how = "failed" if remote(self._servers[server]) else "is gone"
            raise ToolFailure(f"MCP server {server!r} {how}: {self._last_words(server) or _words(error)}.") from error
        except ValidationError as error:
            raise ToolError(f"{name} gave a result that is not valid MCP ({not_mcp(error)}).") from None
        except Exception as error:  # whatever the transport raises
            if "structured content" in str(error):  # the tool broke a promise, the session is well
                raise ToolError(f"{name} gave a result that is not valid MCP ({_words(error)}).") from None
            raise ToolFailure(f"MCP server {server!r} failed: {_words(error)}.") from error
        if message_size(result) > LONGEST:  # of a server of this process, whose messages nothing bounds
            raise ToolFailure(f"MCP server {server!r} failed: {TOO_LONG}.")
        return result

    async def known(self) -> bool:
        """Whether servers that somebody else runs still know the session: they may have been restarted meanwhile."""
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED

        for name, client in self._clients.items():
            if not remote(self._servers[name]):
                continue
            try:
                async with asyncio.timeout(PING):
                    await client.ping()
            except MCPError as error:
                if error.error.code == CONNECTION_CLOSED:
                    return False
            except TimeoutError:  # slow is not gone
                pass
            except Exception:
                return False
        return True

    async def close(self) -> None:
        """Ends the session, the servers started for it, and their folder; also while it starts."""
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._end()

    async def _end(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSING):
                    await client.close()  # ends the server too: its transport is not kept alive
        if self._scratch is not None:
            scratch, self._scratch = self._scratch, None
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    def _client(self, name: str, entry: Any) -> Any:
        """A fastmcp client for one server.

        It shakes hands in the classic way: a session with state is what an episode wants, and a server that knows
        nothing newer might never answer the question for it.
        """
        import fastmcp
        from fastmcp.mcp_config import MCPConfig

        from llm_gym.envs.tools.mcp.transport import Briefly

        transport: Any
        if not isinstance(entry, Mapping):
            from llm_gym.envs.tools.mcp.in_process import transport_to

            transport = transport_to(entry() if callable(entry) else entry)
        elif "command" in entry:
            transport = self._leashed(name, entry)
        else:
            from llm_gym.envs.tools.mcp.http import client_factory

            found = MCPConfig.from_dict({"mcpServers": {name: dict(entry)}}).mcpServers[name]
            transport = found.to_transport()
            transport.httpx_client_factory = client_factory(getattr(transport, "verify", None))
            transport.max_sse_event_size = LONGEST
        return fastmcp.Client(Briefly(transport), mode="legacy", init_timeout=self._start_timeout, log_handler=_ignore)

    def _leashed(self, name: str, entry: Mapping[str, Any]) -> Any:
        """The transport of a server started by us, with the environment of its entry and nothing else of ours."""
        from fastmcp.client.transports import StdioTransport

        self._scratch = self._scratch or Path(tempfile.mkdtemp(prefix="llm_gym-mcp-"))
        scratch = str(self._scratch)
        env = {"HOME": scratch, "TMPDIR": scratch, **entry.get("env", {})}
        env = {key: str(value).replace(SCRATCH, scratch) for key, value in env.items()}
        names = ",".join({"PATH": 0, **env})
        command = [entry["command"], *entry.get("args", ())]
        return StdioTransport(
            sys.executable,
            ["-I", "-S", str(LEASH), str(os.getpid()), names, scratch, str(LONGEST)]
            + [str(part).replace(SCRATCH, scratch) for part in command],
            env=env,
            cwd=str(entry.get("cwd") or scratch).replace(SCRATCH, scratch),
            keep_alive=False,
            log_file=self._errors(name),
        )

    def _errors(self, name: str) -> Path:
        """Where a server's standard error goes."""
        assert self._scratch is not None
        return self._scratch / f".{name.replace('/', '_')}.stderr"

    def _last_words(self, name: str) -> str:
        """The last line that a server wrote to its standard error."""
        try:
            with self._errors(name).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 2000))
                lines = file.read().decode("utf-8", "replace").split("\n")
        except (OSError, AssertionError):
            return ""
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "").rstrip(".")


class Pool:
    """Sessions with one set of servers, some of them started ahead of need; environments with these servers share it.

    Args:
        servers: as for `Session`.
        start_timeout: as for `Session`.
        ahead: sessions kept ready.
        shared: whether everybody gets the same session.
    """

    _pools: ClassVar[dict[Any, Pool]] = {}
    _pools_lock = threading.Lock()

    def __init__(self, servers: Mapping[str, Any], *, start_timeout: float, ahead: int, shared: bool) -> None:
        import fastmcp.client.transports  # here, because it may take seconds, which are no server's
        import fastmcp.mcp_config  # noqa: F401

        _hush()
        self.users, self._process = 0, os.getpid()
        self._servers, self._start_timeout = servers, start_timeout
        self._ahead, self.shared = 1 if shared else ahead, shared
        self._remote = any(map(remote, servers.values()))
        self.loop = Loop("llm_gym-mcp", patience=CLOSING)
        self._lock = threading.Lock()
        self._tools: dict[str, tuple[str, Any]] | None = None
        self._ready: deque[Session] = deque()
        self._closing: set[Future[None]] = set()

    @classmethod
    def enter(cls, servers: Mapping[str, Any], **options: Any) -> Pool:
        """The process's pool for these servers and options, with one more user."""
        key = os.getpid(), json.dumps([servers, options], default=id, sort_keys=True)
        with cls._pools_lock:
            pool = cls._pools.get(key)
            if pool is None:
                pool = cls._pools[key] = cls(servers, **options)
            pool.users += 1
            return pool

    def leave(self) -> None:
        """One user less; the last one ends all sessions, and waits for that. In a forked child they are not ours."""
        if os.getpid() != self._process:
            return
        with self._pools_lock:
            self.users -= 1
            if self.users:
                return
            for key in [key for key, pool in self._pools.items() if pool is self]:
                del self._pools[key]
        self._close()

    def tools(self) -> dict[str, tuple[str, Any]]:
        """The tools of the servers, as `Session.tools`.

        Raises:
            ToolFailure: the servers do not start.
        """
        if self._tools is None:
            session = self.take()
            self._tools = session.tools
            if not self.shared:
                with self._lock:
                    self._ready.appendleft(session)
        return self._tools

    def take(self) -> Session:
        """A session that nobody else has (unless shared), started now if none is ready.

        Raises:
            ToolFailure: the servers do not start.
        """
        while True:
            with self._lock:
                waiting = bool(self._ready)
                session = self._ready.popleft() if waiting else self._start()
                if self.shared:
                    self._ready.append(session)
            assert session.started is not None
            try:
                self._wait(session.started, self._start_timeout + CLOSING, "starting")
            except ToolFailure:
                self._forget(session)
                if waiting:  # what failed earlier says nothing of now
                    continue
                raise
            if not (waiting and self._remote) or self._wait(self.loop.submit(session.known()), PING, "asking"):
                break
            self._forget(session)
        with self._lock:
            while len(self._ready) < self._ahead:
                self._ready.append(self._start())
        return session

    def call(self, session: Session, name: str, arguments: dict[str, Any], timeout: float) -> str:
        """The result of a tool as text, waited for; a session whose server is gone is nobody's any more.

        Raises:
            ToolError: the tool says so, or as `Session.call`.
            ToolFailure: as `Session.call`.
        """
        try:
            result = self._wait(self.loop.submit(session.call(name, arguments, timeout)), timeout + 1, name)
        except ToolFailure:
            self._forget(session)
            raise
        text = result_text(result)  # here, not in the loop that everybody shares
        if result.is_error:
            raise ToolError(text or f"{name} failed and did not say why.")
        return text

    def give_back(self, session: Session) -> None:
        """Ends a session that was taken, unless others have it too; nobody waits for it."""
        if not self.shared:
            self._end(session)

    def _forget(self, session: Session) -> None:
        """Lets nobody have a session that is broken; who has it already takes another, if it is shared."""
        session.lost = True
        with self._lock, contextlib.suppress(ValueError):
            self._ready.remove(session)
        self._end(session)

    def _end(self, session: Session) -> None:
        future = self.loop.submit(session.close())
        self._closing.add(future)
        future.add_done_callback(self._closing.discard)

    def _close(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, deque()
        for session in ready:
            self._end(session)
        for future in list(self._closing):
            with contextlib.suppress(TimeoutError, CancelledError):
                future.result(CLOSING + MARGIN)
        self.loop.stop()

    def _start(self) -> Session:
        session = Session(self._servers, self._start_timeout, self._tools)
        session.started = self.loop.submit(session.start())
        return session

    def _wait(self, future: Future[T], timeout: float, what: str) -> T:
        try:
            return future.result(timeout + MARGIN)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise ToolFailure(f"MCP: {what} took more than {timeout + MARGIN:g} seconds.") from None


async def _ignore(message: Any) -> None:
    """A server's log messages are its own affair."""


def remote(entry: Any) -> bool:
    """Whether a server is one that somebody else runs, at a URL."""
    return isinstance(entry, Mapping) and "url" in entry


def _hush() -> None:
    """Keeps the tracebacks of the protocol's libraries out of the log: what fails is said by who called.

    LLMGYM_DEBUG=1 lets them.
    """
    if not os.environ.get("LLMGYM_DEBUG"):
        for name in ("mcp", "fastmcp"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _words(error: BaseException) -> str:
    """The first line of an error's text, or what is wrong with a message that is not as MCP has it."""
    if hasattr(error, "errors"):
        return f"what it sent is not valid MCP ({not_mcp(error)})"
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")[:300]


def _after_fork() -> None:
    """A forked child starts with a lock that nobody holds; whoever held it is not here to let go."""
    Pool._pools_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
