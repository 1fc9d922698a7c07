"""What stands before a vLLM server's own routes: its token, and the way in for weights from another host.

vLLM makes a `Gate` of its application when started with `--middleware llm_gym.policies.vllm_server.gate.Gate`.

    PUT    /llm_gym/weights/{run}/{update}/{file}?room=BYTES    the file as the body -> {"folder": ..., "sha256": ...}
    DELETE /llm_gym/weights/{run}                               removes all of them

The trainer compares the checksum before it tells the workers to read the folder. `room` is what all files of the update
take together; it decides where they go.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llm_gym.access import TOKEN, lacks

FOLDERS = "LLM_GYM_UPLOADS"
"""The variable that names the folders for weights, the first with room is taken."""
ROUTE = "/llm_gym/weights/"
OPEN = ("/health",)
"""Routes that need no token: they say nothing but that the server is there."""
PIECE = 4 << 20
"""Bytes that are written at a time."""
_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Refused(Exception):
    """A request that is answered with an HTTP error status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Gate:
    """An ASGI application around another.

    Args:
        app: what answers everything but uploads.
        token: what requests must carry as `Authorization: Bearer TOKEN`; empty: nothing; None: the environment's.
        folders: where uploads may be written; None: those that the environment names.
    """

    def __init__(self, app: App, token: str | None = None, folders: Sequence[Path] | None = None) -> None:
        self._app = app
        self._token = os.environ.get(TOKEN, "") if token is None else token
        named = filter(None, os.environ.get(FOLDERS, "").split(os.pathsep))
        self._folders = [Path(name) for name in named] if folders is None else list(folders)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        asked = scope["type"] in ("http", "websocket")
        try:
            if asked and scope["path"] not in OPEN:
                self._look_at_token(_headers(scope))
            if not asked or not scope["path"].startswith(ROUTE):
                await self._app(scope, receive, send)
                return
            await _answer(send, 200, await self._weights(scope, receive))
        except Refused as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
            else:
                await _answer(send, error.status, {"error": {"message": str(error)}})
        except Left:
            pass

    def _look_at_token(self, headers: dict[str, str]) -> None:
        if told := lacks(headers.get("authorization", ""), self._token):
            raise Refused(401, f"{told}; give the same in policy.server.token or {TOKEN}")

    async def _weights(self, scope: Message, receive: Receive) -> dict[str, Any]:
        parts = scope["path"].removeprefix(ROUTE).split("/")
        named = all(map(_NAME.fullmatch, parts))
        if named and (scope["method"], len(parts)) == ("DELETE", 1):
            for folder in self._folders:
                shutil.rmtree(folder / parts[0], ignore_errors=True)
            return {}
        if not named or (scope["method"], len(parts)) != ("PUT", 3):
            raise Refused(404, f"{scope['method']} {scope['path']} is nothing that can be asked for")
        length = _headers(scope).get("content-length", "")
        if not length.isdigit():
            raise Refused(411, "an upload must say its length")
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        room = max(int(length), *map(int, filter(str.isdigit, query.get("room", []))), 0)
        folder = self._place(parts[0], parts[1], room)
        with _whole(folder / parts[2]) as file:
            checksum = await _receive(receive, file, int(length))
        return {"folder": str(folder), "sha256": checksum}

    def _place(self, run: str, update: str, room: int) -> Path:
        """The folder of an update, with `room` bytes free when it is made; what other runs left is removed."""
        for folder in self._folders:
            for other in folder.iterdir():
                if other.name != run:
                    shutil.rmtree(other, ignore_errors=True)
        for folder in self._folders:
            if (folder / run / update).is_dir():
                return folder / run / update
        free = {folder: shutil.disk_usage(folder).free for folder in self._folders}
        for folder, left in free.items():
            if room <= left:
                (folder / run / update).mkdir(parents=True)
                return folder / run / update
        most = max(free.values(), default=0)
        where = " and ".join(str(folder.parent) for folder in free) or "no folder"
        raise Refused(
            413, f"the weights take {_gigabytes(room)}, and {where} of the server has {_gigabytes(most)} left"
        )


class Left(Exception):
    """The sender has closed the connection: there is nobody to answer."""


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only once it is whole; nothing is left of one that is not."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise Refused(507, f"the weights cannot be written to {path.parent}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


async def _receive(receive: Receive, file: BinaryIO, length: int) -> str:
    """Writes a request's body, of `length` bytes at most; its SHA-256."""
    digest, held, more = hashlib.sha256(), bytearray(), True

    def put(piece: bytes) -> None:
        digest.update(piece)
        file.write(piece)

    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Left
        held += message.get("body", b"")
        more = message.get("more_body", False)
        if (length := length - len(message.get("body", b""))) < 0:
            raise Refused(400, "the body is longer than it was said to be")
        if len(held) >= PIECE or not more:
            await asyncio.to_thread(put, bytes(held))  # completions go on meanwhile
            held.clear()
    return digest.hexdigest()


async def _answer(send: Send, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def _headers(scope: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
