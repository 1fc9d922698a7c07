"""Sessions with MCP servers, all in one event loop of their own, for environments that block.

Every await has a deadline that is kept from outside too, so a server that is silent, prints garbage or dies ends a
call as an error and never as a hang. A server started by us runs on a leash (see `leash.py`), in a folder of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llm_gym.envs.tools.mcp_results import public_names, result_text
from llm_gym.errors import ToolError, ToolFailure

T = TypeVar("T")
LEASH = Path(__file__).with_name("leash.py")
MARGIN = 5.0
"""Seconds beyond a deadline after which the loop itself is not waited for."""
CLOSING = 10.0
"""Seconds in which a session must be closed."""
SCRATCH = "{scratch}"
"""Stands for the session's own folder in a server's arguments, environment and directory."""


class Loop:
    """An event loop in a thread, shared by whoever uses it; it ends when nobody does."""

    _lock = threading.Lock()
    _shared: Loop | None = None

    def __init__(self) -> None:
        self.users = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="llm_gym-mcp", daemon=True)
        self.thread.start()

    @classmethod
    def enter(cls) -> Loop:
        """The process's loop, with one more user."""
        with cls._lock:
            if cls._shared is None or not cls._shared.thread.is_alive():  # a forked child has no thread
                cls._shared = cls()
            cls._shared.users += 1
            return cls._shared

    def leave(self) -> None:
        """One user less; the last one ends the loop."""
        with self._lock:
            self.users -= 1
            if self.users or Loop._shared is not self:
                return
            Loop._shared = None
        with contextlib.suppress(TimeoutError):
            self.wait(self.submit(_drain()), CLOSING)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait(self, future: Future[T], timeout: float) -> T:
        """What the coroutine returns or raises.

        Raises:
            TimeoutError: there is nothing within `timeout` seconds and a margin.
        """
        try:
            return future.result(timeout + MARGIN)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise TimeoutError from None


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

    async def call(self, name: str, arguments: dict[str, Any], timeout: float) -> str:
        """The result of a tool as text.

        Raises:
            ToolError: the tool says so, or there is no result in time.
            ToolFailure: the server is gone.
        """
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

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
            if error.error.code != CONNECTION_CLOSED:
                raise ToolError(str(error.error.message)) from None
            raise ToolFailure(f"MCP server {server!r} is gone: {self._last_words(server) or error}.") from error
        except Exception as error:  # whatever the transport raises
            raise ToolFailure(f"MCP server {server!r} failed: {_words(error)}.") from error
        text = result_text(result)
        if result.is_error:
            raise ToolError(text)
        return text

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
        from fastmcp.client.transports import infer_transport
        from fastmcp.mcp_config import MCPConfig

        if not isinstance(entry, Mapping):
            transport = infer_transport(entry() if callable(entry) else entry)
        elif "command" in entry:
            transport = self._leashed(name, entry)
        else:
            transport = MCPConfig.from_dict({"mcpServers": {name: dict(entry)}}).mcpServers[name].to_transport()
        return fastmcp.Client(transport, mode="legacy", init_timeout=self._start_timeout, log_handler=_ignore)

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
            ["-I", "-S", str(LEASH), str(os.getpid()), names, scratch]
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

        self.users = 0
        self._servers, self._start_timeout = servers, start_timeout
        self._ahead, self._shared = 1 if shared else ahead, shared
        self._loop = Loop.enter()
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
        """One user less; the last one ends all sessions, and waits for that."""
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
            if not self._shared:
                with self._lock:
                    self._ready.appendleft(session)
        return self._tools

    def take(self) -> Session:
        """A session that nobody else has (unless shared), started now if none is ready.

        Raises:
            ToolFailure: the servers do not start.
        """
        with self._lock:
            session = self._ready.popleft() if self._ready else self._start()
            if self._shared:
                self._ready.append(session)
        assert session.started is not None
        try:
            self._wait(session.started, self._start_timeout + CLOSING, "starting")
        except ToolFailure:
            self._forget(session)
            raise
        with self._lock:
            while len(self._ready) < self._ahead:
                self._ready.append(self._start())
        return session

    def call(self, session: Session, name: str, arguments: dict[str, Any], timeout: float) -> str:
        """`Session.call`, waited for; a shared session whose server is gone is started anew for the next taker."""
        try:
            return self._wait(self._loop.submit(session.call(name, arguments, timeout)), timeout + 1, name)
        except ToolFailure:
            self._forget(session)
            raise

    def give_back(self, session: Session) -> None:
        """Ends a session that was taken, unless others have it too; nobody waits for it."""
        if not self._shared:
            self._end(session)

    def _forget(self, session: Session) -> None:
        """Lets nobody have a session that is broken."""
        with self._lock, contextlib.suppress(ValueError):
            self._ready.remove(session)
        self._end(session)

    def _end(self, session: Session) -> None:
        future = self._loop.submit(session.close())
        self._closing.add(future)
        future.add_done_callback(self._closing.discard)

    def _close(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, deque()
        for session in ready:
            self._end(session)
        for future in list(self._closing):
            with contextlib.suppress(TimeoutError):
                self._loop.wait(future, CLOSING)
        self._loop.leave()

    def _start(self) -> Session:
        session = Session(self._servers, self._start_timeout, self._tools)
        session.started = self._loop.submit(session.start())
        return session

    def _wait(self, future: Future[T], timeout: float, what: str) -> T:
        try:
            return self._loop.wait(future, timeout)
        except TimeoutError:
            raise ToolFailure(f"MCP: {what} took more than {timeout + MARGIN:g} seconds.") from None


async def _drain() -> None:
    """Ends what is left in the loop, its helper threads too."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=CLOSING)
    await asyncio.get_running_loop().shutdown_default_executor()


async def _ignore(message: Any) -> None:
    """A server's log messages are its own affair."""


def _words(error: BaseException) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")[:300]


def _after_fork() -> None:
    """A forked child starts with locks that nobody holds; whoever held them is not here to let go."""
    Loop._lock, Pool._pools_lock = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
