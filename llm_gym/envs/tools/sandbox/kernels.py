"""The Jupyter backend seen from the trainer: kernels of the sandbox, and how a cell runs in one."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from typing import Any

import zmq
from jupyter_client.session import Session

from llm_gym.envs.tools.sandbox import text
from llm_gym.envs.tools.sandbox.sandbox import START_SECONDS, Handle, SandboxError

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
LARGEST, WAITING = 4 << 20, 1000
"""Bytes of one message, and messages waiting to be read; a kernel that sends more loses them."""
KEPT = 1 << 21
"""Characters of a cell's messages that are looked at."""
IDLE_SECONDS = 1.0
"""How long after a cell's last output its reply may still come."""
LOST_SECONDS = 5.0
"""Of silence, after which the reply alone ends a cell: the message that says so was lost in a flood of others."""

_lock = threading.RLock()  # a forgotten session may be collected, and so let go, by the thread that has it
CONTEXTS: list[zmq.Context[zmq.Socket[bytes]]] = []
_users = 0


class KernelHandle(Handle):
    """A kernel: its processes, its connection, and a copy of what the current cell printed.

    The sockets are bound here, in the abstract namespace, and handed to the kernel: there is no
    connection file and no socket file that anybody could read, and nothing to clean up. A network
    namespace (or the refusal of connect) keeps other sessions from reaching them.
    """

    personality = "kernel"
    most_ready = 16

    def __init__(self, namespaces: bool) -> None:
        super().__init__(namespaces)
        self.ip, self.key = f"@llm-gym-{secrets.token_hex(16)}", secrets.token_hex(32)
        self.box = os.memfd_create("output")
        self.shell: zmq.Socket[bytes] | None = None
        self.iopub: zmq.Socket[bytes] | None = None
        self._far += [os.dup(self.box), *self._listen()]
        # Copying keeps pyzmq from starting a thread.
        key, scheme = self.key.encode(), "hmac-sha256"
        self.session = Session(key=key, signature_scheme=scheme, copy_threshold=1 << 30)

    def connection(self) -> dict[str, Any]:
        """What a connection file would say."""
        ports = {f"{name}_port": number for number, name in enumerate(CHANNELS, 1)}
        return {"transport": "ipc", "ip": self.ip, "key": self.key, "signature_scheme": "hmac-sha256", **ports}

    def request(self) -> dict[str, Any]:
        """Its address and its key."""
        return {"ip": self.ip, "key": self.key}

    def _listen(self) -> list[int]:
        found = []
        for number in range(1, 1 + len(CHANNELS)):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0{self.ip[1:]}-{number}")
            listener.listen(16)
            found.append(listener.detach())
        return found

    def connect(self) -> None:
        """Opens our two sockets; the kernel need not be up yet."""
        global _users
        with _lock:
            _users += 1
            context = CONTEXTS[0] if CONTEXTS else zmq.Context()
            CONTEXTS[:] = [context]
        self.shell, self.iopub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
        self.iopub.subscribe(b"")
        for number, one in ((1, self.shell), (2, self.iopub)):
            one.linger, one.maxmsgsize, one.rcvhwm = 0, LARGEST, WAITING
            one.connect(f"ipc://{self.ip}-{number}")

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Until the kernel takes cells and its output reaches us."""
        if self.shell is not None:
            return
        deadline = time.monotonic() + seconds
        super().wait_ready(seconds)
        self.connect()
        while time.monotonic() < deadline:
            # Anything heard shows that the subscription holds. ipykernel's welcome can get lost (its thread
            # misses the event while it publishes something else), so make the kernel say something.
            if self.read(0.2) is not None:
                return
            self.session.send(self.shell, "kernel_info_request")
        raise SandboxError("a kernel of the sandbox published nothing.")

    def read(self, seconds: float, which: str = "iopub") -> dict[str, Any] | None:
        """The next well-formed message; None if none comes within `seconds`. ConnectionError if none will come."""
        deadline = time.monotonic() + seconds
        wanted: Any = getattr(self, which)
        poller = zmq.Poller()
        poller.register(wanted, zmq.POLLIN)
        for watched in (self.lease.sock, self.cells.sock):
            poller.register(watched, zmq.POLLIN)
        while True:
            events = dict(poller.poll(round(max(0.0, deadline - time.monotonic()) * 1000)))
            if not events:
                return None
            if wanted not in events:
                raise ConnectionError
            if (message := self._parse(wanted.recv_multipart())) is not None:
                return message

    def _parse(self, frames: list[bytes]) -> dict[str, Any] | None:
        with contextlib.suppress(Exception):  # code in the kernel can send anything
            message = self.session.deserialize(self.session.feed_identities(frames)[1])
            if isinstance(message.get("content"), dict) and isinstance(message["header"].get("msg_type"), str):
                return dict(message)
        return None

    def abandon(self) -> None:
        """Closes what this process has of the kernel."""
        global _users
        super().abandon()
        if self.box >= 0:
            os.close(self.box)
            self.box = -1
        for one in (self.shell, self.iopub):
            if one is not None:
                one.close()
        if self.shell is not None:
            self.shell = self.iopub = None
            with _lock:
                _users -= 1
                if not _users and CONTEXTS:
                    CONTEXTS.pop().term()


class KernelCell:
    """A cell of a kernel."""

    def start(self, handle: KernelHandle, code: str, seed: int | None) -> None:
        """Sends the request."""
        self.parts, self.length = list[str](), 0
        self.last_words: str | None = None
        if seed is not None:
            self._send(
                handle,
                f"import random as _r, sys as _s; _r.seed({seed})\n"
                f"if 'numpy' in _s.modules: _s.modules['numpy'].random.seed({seed % 2**32})\n"
                "del _r, _s",
                silent=True,
            )
            self.finish(handle, START_SECONDS)
        self._send(handle, code.encode("utf-8", "replace").decode(), silent=False)

    def _send(self, handle: KernelHandle, code: str, silent: bool) -> None:
        content = {
            "code": code,
            "silent": silent,
            "store_history": not silent,
            "user_expressions": {},
            "allow_stdin": False,
            # Otherwise a request that follows a failed cell is dropped without an answer.
            "stop_on_error": False,
        }
        message = handle.session.msg("execute_request", content)
        self.id = message["header"]["msg_id"]
        handle.session.send(handle.shell, message)

    def finish(self, handle: KernelHandle, seconds: float) -> bool | None:
        """Waits for the reply and for the end of the output; either alone could be forged by the cell, and both too."""
        deadline = time.monotonic() + seconds
        try:
            while not self._idle(message := handle.read(min(LOST_SECONDS, deadline - time.monotonic()))):
                if message is None and (ok := self._reply(handle, 0)) is not None:
                    return ok
                if time.monotonic() >= deadline:
                    return None
            return self._reply(handle, max(IDLE_SECONDS, deadline - time.monotonic()))
        except ConnectionError:
            self.last_words = text.read(handle.box, 0, most=KEPT)
            raise

    def _reply(self, handle: KernelHandle, seconds: float) -> bool | None:
        """Whether the reply to this cell says that it succeeded; None if there is none."""
        while (message := handle.read(seconds, "shell")) is not None:
            if message["parent_header"].get("msg_id") == self.id:
                return bool(message["content"].get("status") == "ok")
        return None

    def _idle(self, message: dict[str, Any] | None) -> bool:
        """Takes one message of the output; whether it says that the cell has ended."""
        if message is None or message.get("parent_header", {}).get("msg_id") != self.id:
            return False
        content, kind = message["content"], message["header"]["msg_type"]
        if kind == "status":
            return bool(content.get("execution_state") == "idle")
        self._write(_shown(kind, content))
        return False

    def _write(self, words: str) -> None:
        if self.length < KEPT:
            self.parts.append(words[:KEPT])
            self.length += len(words)

    def output(self, most: int) -> str:
        """What the messages said; of a kernel that died, what its copy holds."""
        words = text.clean("".join(self.parts)) if self.last_words is None else self.last_words
        return text.clip(words, most)

    def close(self) -> None:
        """Nothing is held."""


def _shown(kind: str, content: dict[str, Any]) -> str:
    """The text of one output message."""
    if kind == "stream":
        return str(content.get("text", ""))
    if kind == "error":
        return "\n".join(str(line) for line in content.get("traceback", [])).rstrip("\n") + "\n"
    if kind in ("execute_result", "display_data", "update_display_data") and isinstance(content.get("data"), dict):
        return str(content["data"].get("text/plain", "")) + "\n"
    return ""
