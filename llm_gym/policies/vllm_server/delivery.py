"""How handed-over files reach one server: it reads them where they lie, or they are uploaded to it."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from llm_gym.policies.http import Remote, RemoteError
from llm_gym.policies.vllm_server.gate import ROUTE

STALL = 30.0
"""Seconds in which an upload must go on by a piece of a mebibyte."""


class Delivery:
    """Files for one server.

    Args:
        remote: the server.
        rpc: calls a method of its workers' extension.
        run: sets the uploads of one trainer apart from those of another; letters and digits.
    """

    def __init__(self, remote: Remote, rpc: Callable[..., Awaitable[list[Any]]], run: str) -> None:
        self._remote, self._rpc, self._run = remote, rpc, run
        self._uploaded = False

    async def deliver(self, folders: Iterable[Path]) -> dict[Path, Path]:
        """Folders here -> where the server's workers read the same files.

        Which way is asked each time: a server may come back on another machine.

        Raises:
            RemoteError: an upload failed; one that arrived changed may be repeated.
        """
        folders = list(folders)
        seen = await self._rpc("llm_gym_seen", [str(folder) for folder in folders]) if folders else []
        here = {folder for folder in folders if all(str(folder) in each for each in seen)}
        return {folder: folder if folder in here else await self._upload(folder) for folder in folders}

    async def remove(self) -> None:
        """Takes back what was uploaded; what was only looked at stays."""
        if self._uploaded:
            with contextlib.suppress(RemoteError):  # the next upload of another run removes it, or the server's end
                await self._remote.call("DELETE", ROUTE + self._run, seconds=STALL)
            self._uploaded = False

    async def _upload(self, folder: Path) -> Path:
        files = sorted(folder.iterdir())
        room, place = sum(file.stat().st_size for file in files), ""
        self._uploaded = True
        for file in files:
            path = f"{ROUTE}{self._run}/{folder.name}/{file.name}"
            answer, sent = await self._remote.upload(path, file, params={"room": str(room)}, stall=STALL)
            if answer["sha256"] != sent:
                raise RemoteError(f"{self._remote.url}: {file.name} did not arrive as it was sent (SHA-256 differs)")
            place = answer["folder"]
        return Path(place)
