"""SGLang servers as one policy, by their documented endpoints. Unverified: it has never met a real SGLang server.

It has two ways to hold requests during an update, and neither keeps what is promised here: "in_place" goes on over keys
and values of the old weights; behind "retract" a queue forbids the flush that it needs (sgl-project/sglang issue
33783), and an update whose flush is refused ends the scheduler. So an update aborts what is in flight: each request
answers with the tokens that it has, and goes on as a new one behind them. The new weights compute all of it again.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llm_gym.concurrency import Loop, tries
from llm_gym.core import Completion, Ids, Sampling
from llm_gym.embedded import PATH
from llm_gym.errors import ConfigError, PolicyError, SettingError
from llm_gym.policies.http import Remote, RemoteError
from llm_gym.policies.vllm_server.addresses import addresses, same_model
from llm_gym.policies.vllm_server.labels import new_run, owner
from llm_gym.policies.vllm_server.policy import PER_SERVER
from llm_gym.policies.vllm_server.state import CONTROL, LOADING
from llm_gym.policies.vllm_server.weight_files import new_folder

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")
START = "start it with `python -m sglang.launch_server --model-path MODEL --dtype bfloat16`"


class Server:
    """One server, and what is known of it."""

    def __init__(self, url: str) -> None:
        self.remote, self.lock, self.load = Remote(url), asyncio.Lock(), 0
        self.ours = self.doubted = False  # it has had our weights; it must be asked for them before it is used again

    async def get(self, path: str, **options: Any) -> Any:
        """An answer about it."""
        return await self.remote.call("GET", path, seconds=CONTROL, **options)

    async def change(self, folder: str, label: str) -> None:
        """New weights under a pause; nothing that was computed with the old ones is left."""

        post = partial(self.remote.call, "POST", seconds=LOADING)
        await post("/pause_generation", {"mode": "abort"}, plain=True)
        try:
            # First, for the update's own flush must find the server idle.
            await post("/flush_cache", params={"timeout": f"{CONTROL:g}"}, plain=True)
            update = {"model_path": folder, "weight_version": label, "flush_cache": True}
            answer = await post("/update_weights_from_disk", update)
            if not answer["success"]:
                raise RemoteError(f"{self.remote.url}: {answer['message']}", 400)
        finally:
            await post("/continue_generation", {}, plain=True)


class SGLangPolicy:
    """A `Policy` on running SGLang servers, for one training process; arguments and errors: see `ServerPolicy`."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        servers: Sequence[str] | str = (),
        version: int = 0,
        folder: str | Path | None = None,
        start_seconds: float = 5.0,
        retry_seconds: float = 300.0,
    ) -> None:
        urls = addresses(servers)
        self.version, self.max_rows, self.retry_seconds = version, PER_SERVER * len(urls), retry_seconds
        self.max_context: int
        self.dtype: torch.dtype
        self._weights = self._model = str(model or PATH)
        self.update_seconds: dict[str, float] = {}
        self._run, self._numbers = new_run(), itertools.count()
        self._versions: dict[str, int] = {}
        self._label = self._new_label(version)
        self._files, self._loop = new_folder(folder), Loop("llm_gym-sglang")
        try:
            self._loop.run(self._connect(urls, start_seconds))
        except BaseException:
            self.close()
            raise

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion; SettingError for a sampling whose log-probabilities SGLang does not report.

        The seed counts where the server was started with `--enable-deterministic-inference`.
        """
        return await self._loop.ask(self._complete(context, sampling, seed))

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order."""
        pairs = list(zip(contexts, seeds if seeds is not None else [None] * len(contexts), strict=True))

        async def every() -> list[Completion]:
            return await asyncio.gather(*(self._complete(context, sampling, seed) for context, seed in pairs))

        return self._loop.run(every())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Refused: over HTTP SGLang takes a folder."""
        raise SettingError("engine 'sglang': it takes no tensors, only a folder of weights (`load_folder`).")

    def load_folder(self, folder: str | Path, *, version: int) -> None:
        """Gives every server the weights of a folder; PolicyError if one refuses, or is away for `retry_seconds`."""
        label = self._new_label(version)
        path = self._files / label.rpartition(":")[2]
        shutil.copytree(folder, path)
        before, began = self._weights, time.monotonic()
        self._loop.run(self._update(str(path), label))
        self.update_seconds = {"pause": time.monotonic() - began}
        self.version = version
        if before != self._model:
            shutil.rmtree(before, ignore_errors=True)

    def differing(self, expected: Mapping[str, int]) -> list[str]:
        """Nothing: SGLang reports no checksums that could be compared; the canaries judge alone."""
        return []

    def close(self) -> None:
        """Closes the connections and removes the weights handed over."""
        try:
            self._loop.stop(self._disconnect)
        finally:
            shutil.rmtree(self._files, ignore_errors=True)

    def _new_label(self, version: int) -> str:
        label = f"{self._run}:{next(self._numbers)}"
        self._versions[label] = version
        return label

    # Below here, coroutines run in the thread of `self._loop`.

    async def _complete(self, context: Ids, sampling: Sampling, seed: int | None) -> Completion:
        """Asks until it is whole; what an update cut off goes on behind the tokens that are there."""
        if sampling.temperature and not sampling.full_support:
            raise SettingError(
                f"engine 'sglang': got {sampling}; its log-probabilities leave out top_k, top_p and min_p."
            )
        most = min(self.max_context - len(context), sampling.max_tokens)
        if most < 1:
            raise PolicyError(f"The context has {len(context)} tokens; the servers' limit is {self.max_context}.")
        parts: list[Completion] = []
        tokens = np.empty(0, np.int32)
        while not parts or (parts[-1].finish_reason == "abort" and len(tokens) < most):
            body = request(np.concatenate([context, tokens]), sampling, most - len(tokens), seed)
            parts.append(await persist(partial(self._ask, body, sampling), self.retry_seconds, "A request failed"))
            tokens = np.concatenate([tokens, parts[-1].tokens])
        starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
        spans = [(int(start), part.version) for start, part in zip(starts, parts, strict=False) if len(part.tokens)]
        spans = [spans[0], *(b for a, b in itertools.pairwise(spans) if a[1] != b[1])]
        logprobs = np.concatenate([part.logprobs for part in parts]) * (sampling.temperature > 0)  # greedy is certain
        reason = "length" if parts[-1].finish_reason == "abort" else parts[-1].finish_reason
        return Completion(tokens, logprobs.astype(np.float32), reason, spans[0][1], tuple(spans[1:]))

    async def _ask(self, body: Mapping[str, Any], sampling: Sampling) -> Completion:
        """One request's answer, of the least busy server; with the end `abort` the completion goes on in another."""
        await self._open.wait()
        among = [server for server in self._servers if not server.doubted] or self._servers
        server = min(among, key=lambda server: server.load)
        server.load += 1
        try:
            if server.doubted:
                await self._bring(server)
            label = self._label
            answer = await server.remote.call("POST", "/generate", body)
            return read(answer, self._versions, sampling.stop_token_ids, updated=label != self._label)
        except RemoteError:
            server.doubted = True
            raise
        finally:
            server.load -= 1

    async def _update(self, weights: str, label: str) -> None:
        """Brings every server up to date; no request is sent meanwhile."""
        self._open.clear()
        self._weights, self._label = weights, label
        try:
            each = (partial(self._bring, server) for server in self._servers)
            await asyncio.gather(*(persist(bring, self.retry_seconds, "No new weights for a server") for bring in each))
        finally:
            self._open.set()

    async def _bring(self, server: Server) -> None:
        """Makes a server serve what it must, if it does not; ConfigError if it is another run's."""
        async with server.lock:
            while (held := str((await server.get("/get_model_info"))["weight_version"])) != self._label:
                run = held.partition(":")[0]
                who, alive = owner(run)
                if run != self._run and "." in run and (alive or server.ours):
                    raise ConfigError(f"servers: {server.remote.url} is in use by {who}; start one for each run.")
                await server.change(self._weights, self._label)
            server.ours, server.doubted = True, False

    async def _connect(self, urls: Sequence[str], seconds: float) -> None:
        import torch

        self._open, self._servers = asyncio.Event(), [Server(url) for url in urls]
        self._open.set()
        limits, names = zip(*[await self._greet(server, seconds) for server in self._servers], strict=True)
        if len(set(names)) > 1 or names[0] not in DTYPES:
            raise ConfigError(f"servers: they compute in {', '.join(names)}; {START}, all with the same --dtype.")
        self.max_context, self.dtype = min(limits), getattr(torch, names[0])

    async def _greet(self, server: Server, seconds: float) -> tuple[int, str]:
        """Waits for a server and brings it up to date; its limit of tokens, and the type of its weights."""
        url = server.remote.url
        try:
            await persist(lambda: server.get("/health", plain=True), seconds, f"servers: {url} is not up")
            (card,) = (card for card in (await server.get("/v1/models"))["data"] if not card.get("parent"))
            if served := "" if same_model(card["root"], self._model) else card["root"]:
                raise ConfigError(f"servers: {url} serves {served!r}, not {self._model!r}; {START}.")
            await self._bring(server)
            return int(card["max_model_len"]), str((await server.get("/server_info"))["dtype"])
        except (PolicyError, LookupError, TypeError) as error:
            raise ConfigError(f"servers: {url} does not answer as SGLang does ({error}); {START}.") from error

    async def _disconnect(self) -> None:
        for server in getattr(self, "_servers", []):
            await server.remote.close()


async def persist(attempt: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """What an attempt gives; a failure that may pass is followed by others for so long, then PolicyError."""
    until = math.inf
    async for _ in tries(lambda: until):  # noqa: B023 -- what it is at the pause
        try:
            return await attempt()
        except RemoteError as error:
            until = min(until, time.monotonic() + seconds)
            if not error.passing or time.monotonic() >= until:
                raise PolicyError(f"{what} ({error})") from error
    raise AssertionError


def request(context: Ids, sampling: Sampling, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """The body for `/generate`; whatever the model's generation_config could set otherwise is said."""
    stops = sampling.stop_token_ids
    params = {
        "max_new_tokens": max_tokens,
        "temperature": float(sampling.temperature),
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
        "ignore_eos": stops == (),  # with it, SGLang takes no notice of `stop_token_ids`
        "stop_token_ids": list(stops) if stops else None,
        "sampling_seed": None if seed is None else seed % 2**31,
    }
    return {"input_ids": context.tolist(), "sampling_params": params, "return_logprob": True, "logprob_start_len": -1}


def read(answer: Any, versions: Mapping[str, int], stops: tuple[int, ...] | None, *, updated: bool) -> Completion:
    """What an answer of `/generate` holds; it ends with `abort` if the completion is to go on in another request.

    `versions`: of the weights that were sent, by their labels. `stops`: the ids that may end it (SGLang ends at the
    model's own too); None: any. `updated`: new weights came meanwhile. RemoteError: incomplete, or of other weights.
    """
    try:
        meta = answer["meta_info"]
        kind, matched = meta["finish_reason"]["type"], meta["finish_reason"].get("matched")
        entries = meta.get("output_token_logprobs") or []
        tokens = np.asarray([entry[1] for entry in entries], np.int32)
        logprobs = np.asarray([entry[0] for entry in entries], np.float32)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(f"the server's answer cannot be read: {type(error).__name__}: {error}") from error
    if kind == "abort" and not len(tokens) and updated:
        return Completion(tokens, logprobs, "abort")
    if kind not in ("stop", "length", "abort") or not len(tokens) or (kind == "stop" and matched != tokens[-1]):
        raise RemoteError(f"the server gave no tokens, or not the last ones ({meta['finish_reason']})")
    if (version := versions.get(meta.get("weight_version"))) is None:
        raise RemoteError("the server answered from other weights than it was given")
    foreign = kind == "stop" and stops is not None and matched not in stops
    return Completion(tokens, logprobs, "abort" if foreign else kind, version)
