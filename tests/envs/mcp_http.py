"""A small MCP server over HTTP that can be restarted, refuse, and answer anything; the protocol's own text, no library."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ACT = {"name": "act", "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}}}


class Hosted:
    """What the server does; the tests change it while it serves."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 0
        """The HTTP status of every answer; 0: as it should be."""
        self.full = False
        """Whether it opens no more sessions."""
        self.let_in, self.turned_away = threading.Semaphore(0), threading.Semaphore(0)
        """Count those that it opened and did not open."""
        self.tools: list[dict[str, Any]] = [ACT]
        self.opened = 0
        """Sessions opened so far."""
        self.content: Callable[[str], list[Any]] = lambda text: [{"type": "text", "text": text}]
        """What `act(text)` answers."""
        self._sessions: set[str] = set()

    def restart(self) -> None:
        """Forgets every session, as a server does that was started anew."""
        self._sessions.clear()

    def answer(self, message: dict[str, Any], session: str | None) -> tuple[int, Any, str]:
        """HTTP status, body and session of the answer to a message."""
        method, identity = message["method"], message.get("id")
        if self.status:
            return self.status, "no", ""
        if method == "initialize" and self.full:
            self.turned_away.release()
            return 503, "full", ""
        if method == "initialize":
            self.opened += 1
            self.let_in.release()
            session = f"session-{self.opened}"
            self._sessions.add(session)
        elif session not in self._sessions:
            error = {"code": -32600, "message": "Session not found"}
            return 404, {"jsonrpc": "2.0", "id": None, "error": error}, ""
        if identity is None:
            return 202, "", session
        return 200, {"jsonrpc": "2.0", "id": identity, "result": self._result(method, message)}, session

    def _result(self, method: str, message: dict[str, Any]) -> dict[str, Any]:
        if method == "initialize":
            about = {"name": "hosted", "version": "1"}
            version = message["params"]["protocolVersion"]
            return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
        if method == "tools/list":
            return {"tools": self.tools}
        if method == "tools/call":
            return {"content": self.content(message["params"]["arguments"].get("text", ""))}
        return {}


@contextmanager
def hosted() -> Iterator[Hosted]:
    """The server, as long as it is needed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, body, session = made.answer(message, self.headers.get("mcp-session-id"))
            data = (json.dumps(body) if isinstance(body, dict) else body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json" if isinstance(body, dict) else "text/plain")
            if session:
                self.send_header("mcp-session-id", session)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:  # no stream of messages, and nothing to end
            self.send_response(405)
            self.send_header("content-length", "0")
            self.end_headers()

        do_DELETE = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that hangs up on us

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        made = Hosted(f"http://127.0.0.1:{server.server_port}/mcp")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
