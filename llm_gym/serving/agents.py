"""Agents: programs of anybody's that play an episode by asking a chat endpoint, in place of the driver's own loop."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from llm_gym.access import HOST
from llm_gym.concurrency import Loop, Outcome, Overdue, Runner, is_async, settled, wait, within
from llm_gym.errors import ConfigError, LLMGymError, function_of
from llm_gym.serving.chat import Endpoint

Task = Mapping[str, Any]
"""The row that an episode is about, and as `messages` the environment's opening chat, unless a column is so named."""
Found = float | Mapping[str, float] | str | None
"""What an agent comes to: a reward, named rewards, a text for the environment to score, or None for the last reply."""
MOST_OUTPUT = 1 << 20
"""Bytes of a command's output that are read."""
LEFT_OPEN = 2.0
"""Seconds that the end of the output of a dead process is waited for; another one may hold it."""
TOLD = 300
"""Characters of what a command wrote last to standard error, where it failed."""


class AgentError(LLMGymError):
    """An agent's command that failed; the episode ends with `env_error`."""


class Agent(Protocol):
    """Plays one episode by asking an endpoint."""

    async def solve(self, task: Task, endpoint: Endpoint) -> Found:
        """What came of it."""
        ...

    def close(self) -> None:
        """Ends what was begun."""
        ...


class FunctionAgent:
    """`solve(task, endpoint)`, plain or `async def`.

    Those that are `async def` share one event loop, in a thread of its own; each call of another has a thread. A plain
    one that is given up runs on by itself, but nothing answers it any more.

    Args:
        function: or `package.module:function`.

    Raises:
        ConfigError: it cannot be imported or called.
    """

    def __init__(self, function: str | Callable[[Any, Endpoint], Any]) -> None:
        self._function = function_of("agent.function", function) if isinstance(function, str) else function
        self._async = is_async(self._function)
        self._loop = Loop("llm_gym-agents", patience=1.0) if self._async else None

    async def solve(self, task: Task, endpoint: Endpoint) -> Found:
        """Calls the function."""
        if self._loop is not None:
            outcome: Outcome[Found] = await self._loop.ask(settled(self._function(task, endpoint)))
            return outcome.get()
        thread = Runner()
        try:
            return await wait(await thread.run(partial(self._function, task, endpoint), None))
        finally:
            thread.close()

    def close(self) -> None:
        """Ends the event loop."""
        if self._loop is not None:
            from llm_gym.serving.clients import close_clients

            self._loop.stop(close_clients)


class CommandAgent:
    """A program: the task as JSON on standard input, the endpoint in OPENAI_BASE_URL and OPENAI_API_KEY.

    What it writes to standard output is scored by the environment. At its end, whatever that is, every process of its
    group is killed.

    Args:
        command: as in a shell, but without one.

    Raises:
        ConfigError: there is no such program.
    """

    def __init__(self, command: str) -> None:
        self._arguments = shlex.split(command)
        if not self._arguments or shutil.which(self._arguments[0]) is None:
            raise ConfigError(f"agent.command: got {command!r}, of which no program is found on the PATH.")

    async def solve(self, task: Task, endpoint: Endpoint) -> str:
        """Runs the command.

        Raises:
            AgentError: its exit status is not 0.
        """
        variables = {"OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": endpoint.api_key, **_no_proxy()}
        said, complaint = await _Text.begun(), await _Text.begun()
        try:
            with tempfile.TemporaryFile() as given:
                given.write(json.dumps(task, default=str).encode())
                given.seek(0)
                process = await asyncio.create_subprocess_exec(
                    *self._arguments,
                    stdin=given,
                    stdout=said.end,
                    stderr=complaint.end,
                    env={**os.environ, **variables, "OPENAI_MODEL": endpoint.model},
                    start_new_session=True,
                )
            try:
                await process.wait()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        finally:
            output, errors = await said.read(), await complaint.read()
        if process.returncode:
            last = errors.strip()[-TOLD:] or "it said nothing"
            raise AgentError(f"agent.command: exit status {process.returncode}: {last}")
        return output.strip()

    def close(self) -> None:
        """Nothing is left to end."""


def _no_proxy() -> dict[str, str]:
    """Variables with which clients reach this machine without the proxy that others may name."""
    return {name: ",".join(filter(None, (os.environ.get(name), HOST))) for name in ("NO_PROXY", "no_proxy")}


class _Text:
    """What a process writes, read as it comes: its beginning is kept, and nothing makes it wait.

    A pipe of our own: asyncio takes a process for ended only when nobody holds its pipes any more.
    """

    def __init__(self, stream: asyncio.StreamReader, transport: asyncio.BaseTransport, end: int) -> None:
        self._stream, self._transport, self._kept = stream, transport, bytearray()
        self.end: int = end
        """The descriptor that the process writes to."""
        self._task = asyncio.ensure_future(self._follow())

    @classmethod
    async def begun(cls) -> _Text:
        """A pipe that is read."""
        read, write = os.pipe()
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read, "rb", 0)
        )
        return cls(stream, transport, write)

    async def read(self) -> str:
        """All of it, at the end of the process: what holds the pipe open beyond that is not waited for."""
        os.close(self.end)
        try:
            with suppress(Overdue):
                await within(LEFT_OPEN, self._task)
        finally:
            self._transport.close()
        return self._kept.decode("utf-8", "replace")

    async def _follow(self) -> None:
        while piece := await self._stream.read(1 << 16):
            self._kept += piece[: MOST_OUTPUT - len(self._kept)]
