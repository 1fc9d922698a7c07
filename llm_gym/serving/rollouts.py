"""Rollouts over HTTP: a run hands out tasks, and takes whole groups that others have played.

GET  /v1/run                  the run's settings, as YAML, and the version of its weights
POST /v1/task?player=NAME     a lease of the oldest task, or 204 if there is none for a while, 410 at the end
POST /v1/lease/{id}           the player is still at it
POST /v1/group/{id}           a whole group (episodes as in episode files); once, however often it is posted
POST /v1/complete             a completion by the run's own engine
GET  /v1/weights              the newest weights, as one safetensors file; their version in a header
GET  /v1/status               what waits, who plays, what was refused
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from llm_gym.access import from_a_page, lacks
from llm_gym.concurrency import Loop
from llm_gym.core import Completion, Ids, Sampling
from llm_gym.episode_files import decode
from llm_gym.errors import FAULTS, described
from llm_gym.serving.group_check import wrong_with
from llm_gym.serving.leases import Board, Lease, NotAccepted

LARGEST = 1 << 30
"""Bytes of a group."""
HELD = 10.0
"""Seconds that a question for a task waits for one."""
LOOK = 0.05
"""Seconds between two looks."""
VERSION = "X-Version"
"""The header that says which weights a file holds."""
Complete = Callable[[Ids, Sampling, int | None], Awaitable[Completion]]


class RolloutDoor:
    """A server in a thread of its own.

    Args:
        host: what it listens on.
        port: 0 takes a free one.
        token: what requests must carry as `Authorization: Bearer TOKEN`; empty: nothing.
        run: what players are told: `config` (YAML).
        names: of the environments, in the order of `Task.env`.
        vocabulary: ids that there are.
        complete: the run's own engine.
        board: offers and leases.
        newest: the version of the engine's weights, which may be ahead of what players were told for a moment.
        tell: told in a line of a group that was refused.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        token: str,
        run: Mapping[str, Any],
        names: list[str],
        vocabulary: int,
        complete: Complete,
        board: Board,
        newest: Callable[[], int],
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.state: tuple[int, Path | None] = (0, None)
        """The version of the weights now, and a safetensors file of them; None: there is none to be had."""
        self.over = False
        """Whether the run has ended."""
        self._life = uuid.uuid4().hex  # versions of a run that is resumed begin again at its checkpoint's
        self._token, self._run, self._names, self._vocabulary = token, run, names, vocabulary
        self._complete, self._board, self._newest, self._tell = complete, board, newest, tell
        self._loop = Loop("llm_gym-rollouts-door", patience=1.0)
        try:
            self.port = self._loop.run(self._serve(host, port))
        except BaseException:
            self._loop.stop()
            raise

    def close(self) -> None:
        """Ends the server; players are told that the run is over."""
        self.over = True
        self._loop.run(asyncio.sleep(3 * LOOK))  # those that wait for a task hear it
        self._loop.stop(self._runner.cleanup)

    async def _serve(self, host: str, port: int) -> int:
        app = web.Application(client_max_size=LARGEST, middlewares=[self._guard])
        app.router.add_get("/v1/run", self._describe)
        app.router.add_post("/v1/task", self._task)
        app.router.add_post("/v1/lease/{lease}", self._renew)
        app.router.add_post("/v1/group/{lease}", self._group)
        app.router.add_post("/v1/complete", self._completion)
        app.router.add_get("/v1/weights", self._file)
        app.router.add_get("/v1/status", self._status)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """The token, and refusals as JSON."""
        try:
            if lacks(request.headers.get("Authorization", ""), self._token):
                raise NotAccepted("The token is missing or wrong.", 401)
            if from_a_page(request.headers, self._token):
                raise NotAccepted("Pages in a browser are not answered.", 403)
            answer: web.StreamResponse = await handler(request)
            return answer
        except NotAccepted as error:
            if error.status == 422:
                self._tell(f"stream.serve: a group was refused: {error}")
            return web.json_response({"error": str(error)}, status=error.status)

    async def _describe(self, request: web.Request) -> web.Response:
        return web.json_response({**self._run, "version": self.state[0], "weights": self.state[1] is not None})

    async def _task(self, request: web.Request) -> web.Response:
        player = request.query.get("player", "")
        until = time.monotonic() + HELD
        while (lease := self._board.lease(player, version=self.state[0], now=time.monotonic())) is None:
            if self.over:
                raise NotAccepted("The run is over.", 410)
            if time.monotonic() > until:
                return web.Response(status=204)
            await asyncio.sleep(LOOK)
        return web.json_response({**_told(lease, self._board.seconds), "life": self._life})

    async def _renew(self, request: web.Request) -> web.Response:
        self._board.renew(request.match_info["lease"], now=time.monotonic())
        return web.json_response({"seconds": self._board.seconds})

    async def _group(self, request: web.Request) -> web.Response:
        try:
            episodes = [decode(record) for record in (await request.json())["episodes"]]
        except FAULTS as error:
            raise NotAccepted(f"The body is no group: {described(error)}.", 400) from error

        def check(lease: Lease, group: Any) -> str | None:
            name = self._names[lease.offer.task.env]
            return wrong_with(lease, group, name=name, version=self._newest(), vocabulary=self._vocabulary)

        new = self._board.post(request.match_info["lease"], episodes, check=check, now=time.monotonic())
        return web.json_response({"accepted": True, "new": new})

    async def _completion(self, request: web.Request) -> web.Response:
        try:
            context, how, seed = _question(await request.json())
        except FAULTS as error:
            raise NotAccepted(f"The body asks for no completion: {described(error)}.", 400) from error
        try:
            done = await self._complete(context, how, seed)
        except FAULTS as error:
            raise NotAccepted(f"The policy failed: {described(error)}", 500) from error
        return web.json_response(completion_data(done))

    async def _file(self, request: web.Request) -> web.StreamResponse:
        version, path = self.state
        if path is None:
            raise NotAccepted("This run hands out no weights: set stream.serve_weights=true.", 404)
        return web.FileResponse(path, headers={VERSION: str(version)})

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.state[0], **self._board.status(time.monotonic())})


# What goes over the wire, both ways


def read_sampling(data: Mapping[str, Any]) -> Sampling:
    """The inverse of `asdict`, of what JSON makes of it."""
    stops = data["stop_token_ids"]
    return Sampling(**{**data, "stop_token_ids": None if stops is None else tuple(stops)})


def completion_data(completion: Completion) -> dict[str, Any]:
    """A completion, ready for JSON."""
    arrays = {"tokens": completion.tokens.tolist(), "logprobs": completion.logprobs.astype(float).tolist()}
    ends = {"finish_reason": completion.finish_reason, "version": completion.version, "updates": completion.updates}
    return {**arrays, **ends}


def read_completion(data: Mapping[str, Any]) -> Completion:
    """The inverse of `completion_data`, bit for bit."""
    tokens, logprobs = np.asarray(data["tokens"], np.int32), np.asarray(data["logprobs"], np.float32)
    updates = tuple((int(start), int(version)) for start, version in data["updates"])
    return Completion(tokens, logprobs, data["finish_reason"], data["version"], updates)


def _question(body: Any) -> tuple[Ids, Sampling, int | None]:
    """What a completion is asked for."""
    return np.asarray(body["context"], np.int32), read_sampling(body["sampling"]), body.get("seed")


def _told(lease: Lease, seconds: float) -> dict[str, Any]:
    offer = lease.offer
    how = {**offer.how, "sampling": asdict(offer.how["sampling"])}
    return {"lease": lease.id, "task": asdict(offer.task), "how": how, "version": lease.version, "seconds": seconds}
