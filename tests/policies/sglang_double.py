"""A stand-in for an SGLang server: its routes as documented, every request held to their schema, the embedded model behind.

Routes, fields, types and defaults: docs.sglang.io, "SGLang Native APIs", "Sampling Parameters" and "SGLang for RL Systems",
and the classes in sglang/srt/managers/io_struct.py that those name. Where a real server overlooks an unknown field, this
one answers 422.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from safetensors.torch import load_file

from llm_gym.concurrency import Loop
from llm_gym.core import Sampling
from llm_gym.embedded import PATH
from llm_gym.policies.builtin.policy import TransformersPolicy

INT, REAL, BOOL, TEXT = (int,), (int, float), (bool,), (str,)
IDS, MAYBE = (list,), (type(None),)
SAMPLING: dict[str, tuple[type, ...]] = {
    "max_new_tokens": INT,
    "stop": (str, list, *MAYBE),
    "stop_token_ids": (*IDS, *MAYBE),
    "temperature": REAL,
    "top_p": REAL,
    "top_k": INT,
    "min_p": REAL,
    "frequency_penalty": REAL,
    "presence_penalty": REAL,
    "repetition_penalty": REAL,
    "min_new_tokens": INT,
    "n": INT,
    "ignore_eos": BOOL,
    "skip_special_tokens": BOOL,
    "spaces_between_special_tokens": BOOL,
    "no_stop_trim": BOOL,
    "sampling_seed": (*INT, *MAYBE),
}
BODIES: dict[str, dict[str, tuple[type, ...]]] = {
    "/generate": {
        "rid": TEXT,
        "text": TEXT,
        "input_ids": IDS,
        "sampling_params": (dict,),
        "return_logprob": BOOL,
        "logprob_start_len": INT,
        "top_logprobs_num": INT,
        "return_text_in_logprobs": BOOL,
        "stream": BOOL,
    },
    "/pause_generation": {"mode": TEXT},
    "/continue_generation": {"torch_empty_cache": BOOL},
    "/update_weights_from_disk": {
        "model_path": TEXT,
        "load_format": (*TEXT, *MAYBE),
        "abort_all_requests": BOOL,
        "weight_version": (*TEXT, *MAYBE),
        "is_async": BOOL,
        "torch_empty_cache": BOOL,
        "keep_pause": BOOL,
        "recapture_cuda_graph": BOOL,
        "token_step": INT,
        "flush_cache": BOOL,
    },
}
NEEDED = {"/update_weights_from_disk": {"model_path"}}
MODES = ("abort", "retract", "in_place")


class Refused(Exception):
    """A request that does not fit the documentation."""


def check(path: str, body: Any) -> None:
    """Raises Refused for an unknown field, a missing one, or a value of another type."""
    fields(path, body, BODIES[path])
    if missing := NEEDED.get(path, set()) - body.keys():
        raise Refused(f"{path}: missing {missing}")
    if body.get("mode", "abort") not in MODES:
        raise Refused(f"{path}: mode {body['mode']!r}")
    if path == "/generate":
        if ("text" in body) == ("input_ids" in body):
            raise Refused("/generate: one of text and input_ids")
        ids(body["input_ids"])
        params = body.get("sampling_params", {})
        fields("sampling_params", params, SAMPLING)
        ids(params.get("stop_token_ids") or [])


def fields(where: str, body: Any, known: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(body, dict):
        raise Refused(f"{where}: {body!r:.40}")
    for name, value in body.items():
        if name not in known or type(value) not in known[name]:
            raise Refused(f"{where}: {name}={value!r:.40}")


def ids(values: list[Any]) -> None:
    if any(type(value) is not int or value < 0 for value in values):
        raise Refused(f"no token ids: {values!r:.40}")


class Double:
    """One such server. `fail`: statuses of the next answers of `/generate`; `forgets`: updates that it only says it did."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.fail: list[int] = []
        self.forgets = self.rejects = False
        self.dtype, self.served = "float32", str(PATH)
        self.full = False
        """Whether what comes waits in the queue, until it is aborted there."""
        self.slow = 0
        """Rounds of the loop between two tokens."""
        self._loop, self._port = Loop("sglang-double"), 0
        self.start()

    def start(self) -> None:
        """With the weights that it always starts with, where it was before."""
        self.policy = TransformersPolicy()
        self.label, self._aborts = "default", 0
        self.running = 0
        self._loop.run(self._start())

    def kill(self) -> None:
        self._loop.run(self._runner.cleanup())

    def stop(self) -> None:
        self.kill()
        self._loop.stop()

    async def _start(self) -> None:
        self._go = asyncio.Event()
        self._go.set()
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def _handle(self, request: web.Request) -> web.Response:
        path = request.path
        self.calls[path] += 1
        self.order.append(path)
        text = await request.text()
        try:
            if request.method == "GET":
                return self._about(path)
            if path == "/flush_cache":
                return self._flush(text, request.query)
            if path not in BODIES:
                raise web.HTTPNotFound
            body = await request.json()
            check(path, body)
        except Refused as error:
            return web.json_response({"error": {"message": str(error)}}, status=422)
        self.bodies.append(body)
        routes = {
            "/generate": self._generate,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/update_weights_from_disk": self._update,
        }
        return await routes[path](body)

    def _about(self, path: str) -> web.Response:
        if path == "/health":
            return web.Response()
        known: dict[str, Any] = {
            "/get_model_info": {"model_path": self.served, "is_generation": True, "weight_version": self.label},
            "/server_info": {"model_path": self.served, "dtype": self.dtype, "weight_version": self.label},
            "/v1/models": {
                "object": "list",
                "data": [{"id": self.served, "root": self.served, "max_model_len": self.policy.max_context}],
            },
        }
        if path not in known:
            raise web.HTTPNotFound
        return web.json_response(known[path])

    def _flush(self, text: str, query: Any) -> web.Response:
        if text or query.keys() - {"timeout"}:
            raise Refused(f"/flush_cache: {text!r} {dict(query)}")
        return web.Response(status=400 if self.running else 200, text="...")

    async def _pause(self, body: dict[str, Any]) -> web.Response:
        self._go.clear()
        if body.get("mode", "abort") == "abort":
            self._aborts += 1
            while self.running:
                await asyncio.sleep(0)
        return web.json_response({"status": "ok"})

    async def _continue(self, body: dict[str, Any]) -> web.Response:
        self._go.set()
        return web.json_response({"status": "ok"})

    async def _update(self, body: dict[str, Any]) -> web.Response:
        if self.running:  # the scheduler asserts that its flush succeeds
            return web.json_response({"error": {"message": "the scheduler died"}}, status=500)
        if self.rejects:
            answer = {"success": False, "message": "Failed to get weights iterator", "num_paused_requests": 0}
            return web.json_response(answer, status=400)
        if not self.forgets:
            for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
                self.policy.load(load_file(file).items(), version=0)
        self.label = body.get("weight_version") or self.label
        answer = {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        return web.json_response(answer)

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        await self._go.wait()
        if self.fail:
            return web.json_response({"error": {"message": "it says why"}}, status=self.fail.pop(0))
        self.running += 1
        try:
            return web.json_response(await self._sample(body["input_ids"], body.get("sampling_params", {})))
        finally:
            self.running -= 1

    async def _sample(self, context: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """A token at a time, until one ends it or somebody aborts; what a real one does by a scheduler."""
        before, found, reason = self._aborts, [], None
        if self.full:
            while self._aborts == before:
                await asyncio.sleep(0)
            self.full = False
            return {"text": "", "meta_info": {"id": "0", "finish_reason": {"type": "abort", "message": "in queue"}}}
        # Without a seed of ours, and as SGLang's seeded sampling draws: by the position.
        sampling = Sampling(params["temperature"], max_tokens=1, stop_token_ids=())
        ends = {*(params.get("stop_token_ids") or ()), *self.policy.stop_ids} if not params.get("ignore_eos") else set()
        while reason is None:
            for _ in range(self.slow):
                await asyncio.sleep(0)
            at = np.asarray([*context, *(token for _, token, _ in found)], np.int32)
            seed = params.get("sampling_seed")
            one = await self.policy.complete(at, sampling, seed=None if seed is None else seed + len(at))
            found.append((float(one.logprobs[0]), int(one.tokens[0]), None))
            if self._aborts > before:
                reason = {"type": "abort", "message": "Aborted"}
            elif found[-1][1] in ends:
                reason = {"type": "stop", "matched": found[-1][1]}
            elif len(found) >= params.get("max_new_tokens", 128):
                reason = {"type": "length", "length": len(found)}
        meta = {
            "id": "0",
            "finish_reason": reason,
            "prompt_tokens": len(context),
            "completion_tokens": len(found),
            "weight_version": self.label,
            "output_token_logprobs": found,
        }
        return {"text": "", "output_ids": [token for _, token, _ in found], "meta_info": meta}
