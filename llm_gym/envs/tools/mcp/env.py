"""`MCPTool-v0`: tools of any MCP server (https://modelcontextprotocol.io), by default a calculator of our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llm_gym.envs.tools.mcp.calculator_server import build
from llm_gym.envs.tools.mcp.results import tool_schema
from llm_gym.envs.tools.mcp.session import Pool, Session
from llm_gym.envs.tools.questions import QuestionEnv
from llm_gym.envs.tools.schema import Tool
from llm_gym.errors import ConfigError, ToolFailure, ended, unknown

SESSIONS = ("episode", "shared")


class MCPTool(QuestionEnv):
    """One question, the tools of MCP servers; the reply that calls none must hold the exact answer.

    Args:
        servers: an `mcpServers` JSON file or its content, a URL, or a server object of this process (or a function
            that makes one); None: a calculator, in this process. In a file, `{scratch}` in `args`, `env` and `cwd`
            stands for a folder of the session's own. A server gets the environment that its entry names, `PATH`,
            and that folder as `HOME` and `TMPDIR`; nothing else of the trainer's. What a server at a URL keeps beyond
            a session is shared by all episodes.
        session: `episode`: every episode has servers of its own, started when it first calls a tool; `shared`: all
            episodes of the process use the same ones, and whatever state they keep.
        ahead: sessions started ahead of need.
        start_timeout: seconds in which the servers must start.
        allow: names of the tools shown; None: all.
        deny: names of tools not shown.
        kwargs: the arguments of `QuestionEnv`: which questions, and how tools are called.

    Reward components: `correct`, 1 or 0, and `format` and `tool_calls` of `ToolEnv`. A server that dies, does not
    start, no longer knows the session or sends a message of more than 8 MiB ends the episode with `tool_failure`; a
    call that takes too long, or whose result is not valid MCP, is answered with an error.

    Raises:
        ConfigError: the servers do not start, have no such tool, or the file cannot be read.
        DataError: no such data, or a missing column.
    """

    def __init__(
        self,
        *,
        servers: Any = None,
        session: str = "episode",
        ahead: int = 2,
        start_timeout: float = 30.0,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if session not in SESSIONS:
            raise ConfigError(unknown("session", session, SESSIONS))
        if servers is None and allow is None:
            servers, allow = _calculator(), ("calculator",)
        self.held: Session | None = None
        self.pool: Pool | None = Pool.enter(
            read_servers(servers), start_timeout=start_timeout, ahead=ahead, shared=session == "shared"
        )
        try:
            super().__init__(self._listed(allow, deny), **kwargs)
        except BaseException:
            self._leave()
            raise

    def close(self) -> None:
        """Ends the session, and with the last environment of its kind the pool."""
        self._leave()
        super().close()

    def _listed(self, allow: Sequence[str] | None, deny: Sequence[str]) -> list[Tool]:
        """The servers' tools, those allowed and not denied.

        Raises:
            ConfigError: the servers do not start, or a name is none of their tools'.
        """
        assert self.pool is not None
        try:
            listed = self.pool.tools()
        except ToolFailure as error:
            raise ConfigError(f"servers: {error}") from error
        for argument, names in (("allow", allow or ()), ("deny", deny)):
            for name in names:
                if name not in listed:
                    raise ConfigError(unknown(argument, name, listed))
        return [
            Tool(tool_schema(name, tool), partial(self._call, name), timed=True)
            for name, (_, tool) in listed.items()
            if name not in deny and (allow is None or name in allow)
        ]

    def _call(self, tool: str, /, **arguments: Any) -> str:
        assert self.pool is not None
        if self.held is None or (self.held.lost and self.pool.shared):
            self.held = self.pool.take()
        return self.pool.call(self.held, tool, arguments, self.call_timeout)

    def release(self) -> None:
        """Gives the session back, if there is one."""
        session, self.held = self.held, None
        if session is not None and self.pool is not None:
            self.pool.give_back(session)

    def _leave(self) -> None:
        self.release()
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.leave()


@lru_cache(maxsize=1)
def _calculator() -> Any:
    """The default server, made once: of its tools only the calculator is shown, which keeps no state."""
    return build()


def read_servers(servers: Any) -> dict[str, Any]:
    """Server name -> entry, for every accepted form of the `servers` argument.

    Raises:
        ConfigError: a file that cannot be read, or no server in it.
    """
    if servers is None:
        return {"llm_gym": build}
    if isinstance(servers, str) and servers.startswith(("http://", "https://")):
        return {"server": {"url": servers}}
    if isinstance(servers, str | Path):
        try:
            servers = json.loads(Path(servers).expanduser().read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"servers: cannot read {str(servers)!r}: {ended(error)}") from error
    if not isinstance(servers, Mapping):
        return {"server": servers}
    found = servers.get("mcpServers", servers)
    bad = not isinstance(found, Mapping) or not found
    if bad or not all(callable(e) or not isinstance(e, Mapping) or {"command", "url"} & {*e} for e in found.values()):
        example = '{"mcpServers": {"name": {"command": "...", "args": []}}} or {"url": "..."}'
        raise ConfigError(f"servers: got {json.dumps(servers, default=repr):.80}, want a form like {example}.")
    return dict(found)
