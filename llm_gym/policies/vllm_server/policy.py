"""vLLM servers as one policy: token ids in and out over HTTP, live weights, and recovery when a server dies."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llm_gym.access import token_of
from llm_gym.concurrency import Loop, tries
from llm_gym.core import Completion, Ids, Sampling
from llm_gym.embedded import PATH
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.policies.http import RemoteError
from llm_gym.policies.vllm_server import weight_files
from llm_gym.policies.vllm_server.addresses import addresses, same_model
from llm_gym.policies.vllm_server.broadcast import Group, Transfer, nccl
from llm_gym.policies.vllm_server.labels import Weights, new_run, request
from llm_gym.policies.vllm_server.routing import choose, pieces
from llm_gym.policies.vllm_server.state import ADAPTER, CONTROL, LOADING, Ranks, Role, Server

if TYPE_CHECKING:
    import torch

PER_SERVER = 128
"""Episodes under way at once, per server."""
FAULTS = 6
"""A healthy server that answers so many times with an error will not do otherwise."""
_START = "start it with `llmgym serve`"

T = TypeVar("T")
log = logging.getLogger(__name__)


class ServerPolicy:
    """A `Policy` on one or more running vLLM servers, as `llmgym serve` starts them.

    Args:
        model: folder or hub id that the servers were started with; None: the embedded model.
        servers: their URLs, a sequence or one string with commas.
        version: version of the weights in `model`.
        max_context: most tokens of context and completion together; None: the servers' own limit.
        folder: where weights are handed over; None: shared memory, or where there is none the folder for temporary
            files. A server that does not see it under the same path gets them as an upload.
        token: what the servers ask for; None: the environment's LLM_GYM_TOKEN.
        start_seconds: how long to wait for servers that are not up yet.
        retry_seconds: how long a request waits for a server to come back before it fails.
        on_wait: hears what is waited for, and how much longer.
        ranks: the processes that use these servers together, each with such a policy, and load weights at the same
            time; None: this one alone.

    Raises:
        ConfigError: a server that does not answer in time, serves another model, lacks what updates need, or is
            another run's; the last also later, from every method.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        servers: Sequence[str] | str = (),
        version: int = 0,
        max_context: int | None = None,
        folder: str | Path | None = None,
        token: str | None = None,
        start_seconds: float = 5.0,
        retry_seconds: float = 300.0,
        on_wait: Callable[[str], None] = log.warning,
        ranks: Ranks | None = None,
    ) -> None:
        urls, self._token = addresses(servers), token_of(token)
        rank, size = (ranks.rank, ranks.size) if ranks is not None else (0, 1)
        self._ranks, self._leads, self._alone = ranks, rank == 0, size == 1
        urls = urls[rank % len(urls) :] + urls[: rank % len(urls)]  # equally busy servers are taken in this order
        self.version, self.max_rows = version, max(1, PER_SERVER * len(urls) // size)
        self.max_context = 0
        self.dtype: torch.dtype
        self._model, self.retry_seconds = str(model or PATH), retry_seconds
        self.update_seconds: dict[str, float] = {}
        self._updates = itertools.count(1)
        self.want = Weights(new_run(), update=0, base=0, version=version)
        self._files = weight_files.new_folder(folder) if self._leads else None
        self._group: Group | None = None
        self._loop = Loop("llm_gym-servers")
        try:
            self.want = self._first(lambda: self._loop.run(self._connect(urls, start_seconds, on_wait)))
            if not self._leads:
                self._loop.run(self._connect(urls, start_seconds, on_wait))
            if max_context is not None and max_context > self.max_context:
                raise ConfigError(f"max_context: got {max_context}, but the servers' limit is {self.max_context}.")
            self.max_context = max_context or self.max_context
        except BaseException:
            self.close()
            raise

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion; cancelling the awaiting task aborts the request in the server.

        Raises:
            PolicyError: a context that is too long, a request that a server refuses, or no server for
                `retry_seconds`.
        """
        return await self._loop.ask(self._complete(context, sampling, seed))

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order."""
        of = seeds if seeds is not None else [None] * len(contexts)

        async def every() -> list[Completion]:
            pairs = zip(contexts, of, strict=True)
            return await asyncio.gather(*(self._complete(context, sampling, seed) for context, seed in pairs))

        return self._loop.run(every())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Gives every server new weights; requests under way go on with them, their caches recomputed.

        A server that is away gets them when it is back. Returns when at least one has them.

        Raises:
            PolicyError: a server cannot load them, or none is there for `retry_seconds`.
        """
        if not self._leads:
            deque(tensors, maxlen=0)  # those of a split model must be gathered by all processes
        self._switch(version, lambda path: weight_files.write(path / "model.safetensors", tensors))

    def load_broadcast(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """The same over NCCL, from this process's GPU to those of all servers; a server that is lost ends the run.

        Raises:
            PolicyError: not every server is there, or has them within `retry_seconds`.
            SettingError: there is no CUDA device.
        """
        weights = self._first(lambda: self._loop.run(self._broadcast(list(tensors), version)))
        if not self._leads:
            self._loop.run(self._update(weights))
        self.version = version

    def load_folder(self, folder: str | Path, *, version: int) -> None:
        """The same from the safetensors files of a model folder, which may be deleted afterwards."""
        self._switch(version, lambda path: weight_files.copy(Path(folder), path))

    def load_adapter(
        self, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any], *, version: int
    ) -> None:
        """The same for an adapter alone, replaced in place; the weights beneath it stay.

        Args:
            tensors: PEFT's names (`base_model.model.<module>.lora_A.weight`).
            config: what PEFT writes to `adapter_config.json` (`r`, `lora_alpha`, `target_modules` ...).
            version: as everywhere.

        Raises:
            PolicyError: as `load`; a server that was started without `enable_lora` cannot load any.
        """

        def write(path: Path) -> None:
            weight_files.write(path / "adapter_model.safetensors", tensors)
            (path / "adapter_config.json").write_text(json.dumps(dict(config), default=str), "utf-8")

        self._switch(version, write, adapter=True)

    def differing(self, expected: Mapping[str, int]) -> list[str]:
        """The tensors that some server does not hold as the learner does.

        Args:
            expected: `checksums.checksums` of the learner's tensors (and of the adapter's) in `self.dtype`.
        """
        from llm_gym.models.checksums import differing

        reports = self._loop.run(self._reports(list(expected)))
        wrong = {name for each in reports for name in differing(expected, each)}
        return [name for name in expected if name in wrong]

    def close(self) -> None:
        """Closes the connections and removes the weights handed over; requests under way fail with `PolicyError`."""
        try:
            self._loop.stop(self._disconnect)
        finally:
            if self._files is not None:
                shutil.rmtree(self._files, ignore_errors=True)

    # Below here, coroutines run in the thread of `self._loop`.

    async def _complete(self, context: Ids, sampling: Sampling, seed: int | None) -> Completion:
        """Asks one server after another; every try is the whole request with the same seed."""
        room = self.max_context - len(context)
        if room < 1:
            raise PolicyError(f"The context has {len(context)} tokens; the servers' limit is {self.max_context}.")
        body = request(context, sampling, min(room, sampling.max_tokens), seed)
        keys = pieces(context) if len(self.servers) > 1 else []
        since, faults = None, 0
        async for _ in tries():
            server = await self._pick(keys, since)
            server.prefixes.add(keys)  # at once: those of a group come together
            try:
                named = {"model": ADAPTER} if self.want.adapter is not None else {}
                completion = await server.ask(body | named)
            except RemoteError as error:
                faults += error.status is not None
                if not error.passing or faults >= FAULTS:
                    raise PolicyError(f"A request failed: {error}") from error
                log.info("repeating a request: %s", error)
                server.doubt(error)
                server.repeated()
                since = since or time.monotonic()
                continue
            if keys:
                server.prefixes.add(pieces(np.concatenate([context, completion.tokens])))
            return completion
        raise AssertionError

    async def _pick(self, keys: list[bytes], since: float | None) -> Server:
        """A server that is there; waits for one, in all `retry_seconds` since the request's first failure."""
        since = since or time.monotonic()
        while not (ready := [server for server in self.servers if server.ready]):
            if taken := next((server.taken for server in self.servers if server.taken), None):
                raise taken
            left = since + self.retry_seconds - time.monotonic()
            try:
                await asyncio.wait_for(self._any.wait(), left)
            except TimeoutError:
                reasons = "; ".join(server.reason for server in self.servers)
                raise PolicyError(f"No server for {self.retry_seconds:g} s: {reasons}") from None
        if len(ready) == 1:
            return ready[0]
        cached = [server.prefixes.cached(keys) for server in ready]
        return ready[choose([server.load for server in ready], cached)]

    def _switch(self, version: int, write: Callable[[Path], None], *, adapter: bool = False) -> None:
        """Makes all servers serve what `write` puts into a folder; all processes go on when the first has done so."""
        weights = self._first(lambda: self._send(version, write, adapter=adapter))
        if not self._leads:
            self._loop.run(self._update(weights))
        self.version = version

    def _first(self, make: Callable[[], T]) -> T:
        return make() if self._ranks is None else self._ranks.on_rank0(make, "weights for the servers")

    def _send(self, version: int, write: Callable[[Path], None], *, adapter: bool) -> Weights:
        """Hands over what `write` puts into a folder, and forgets what was before."""
        assert self._files is not None
        number, before = next(self._updates), self.want
        path = self._files / str(number)
        path.mkdir()
        began = time.monotonic()
        write(path)
        written = time.monotonic() - began
        if adapter:
            weights = replace(before, update=number, version=version, adapter=path)
        else:
            weights = Weights(before.run, number, number, version, path)
        self._loop.run(self._update(weights))
        self._forget(before)
        self.update_seconds["transfer"] += written
        return replace(weights, transfer=None)

    def _forget(self, before: Weights) -> None:
        """What was wanted before is wanted no more; notes what the new weights took."""
        for old in {before.source, before.adapter} - {None, self.want.source}:
            shutil.rmtree(str(old), ignore_errors=True)
        took = [server.seconds for server in self.servers]
        self.update_seconds = {name: max(each.get(name, 0.0) for each in took) for name in ("transfer", "pause")}

    async def _broadcast(self, tensors: list[tuple[str, torch.Tensor]], version: int) -> Weights:
        self._group = self._group or Group(nccl())
        number = next(self._updates)
        sent = [(name, tensor.detach().to(self.dtype)) for name, tensor in tensors]
        transfer = Transfer(sent, len(self.servers))
        before, self.want = self.want, Weights(self.want.run, number, number, version, transfer=transfer)
        await self._group.send(self.servers, sent, transfer, self.retry_seconds)
        self._forget(before)
        return replace(self.want, transfer=None)

    async def _update(self, weights: Weights) -> None:
        self.want = weights
        there = [server for server in self.servers if server.ready]
        found = await asyncio.gather(*(server.bring() for server in there), return_exceptions=True)
        for server, error in zip(there, found, strict=True):
            if isinstance(error, RemoteError):
                server.doubt(error)
                if await server.refuses(error):
                    raise PolicyError(f"A server could not take the new weights: {error}") from error
            elif isinstance(error, BaseException):
                raise error
        await self._pick([], None)

    async def _reports(self, names: list[str]) -> list[list[Any]]:
        """What the workers of each server that is there say about their weights."""
        while True:
            await self._pick([], None)
            there = [server for server in self.servers if server.ready]
            asked = (server.rpc("llm_gym_checksums", names, seconds=LOADING) for server in there)
            found = await asyncio.gather(*asked, return_exceptions=True)
            for server, answer in zip(there, found, strict=True):
                if isinstance(answer, RemoteError) and not await server.refuses(answer):
                    server.doubt(answer)  # it gets the weights when it is back
                elif isinstance(answer, BaseException):
                    raise answer
            if reports := [answer for answer in found if not isinstance(answer, BaseException)]:
                return reports

    async def _connect(self, urls: Sequence[str], start_seconds: float, on_wait: Callable[[str], None]) -> Weights:
        self._any = asyncio.Event()
        role: Role = "alone" if self._alone else "leader" if self._leads else "follower"
        self.servers = [Server(url, lambda: self.want, self._changed, role, self._token) for url in urls]
        limits = await asyncio.gather(*(self._greet(server, start_seconds, on_wait) for server in self.servers))
        self.max_context = min(limits)
        self.dtype = await self._dtype()
        self._watches = [asyncio.ensure_future(server.watch()) for server in self.servers]
        return self.want

    async def _greet(self, server: Server, start_seconds: float, on_wait: Callable[[str], None]) -> int:
        """Waits for a server, looks whether it is what it must be, and returns its limit of tokens."""
        url, began = server.remote.url, time.monotonic()
        async for _ in tries(lambda: began + start_seconds):
            try:
                await server.remote.call("GET", "/health", seconds=CONTROL)
                break
            except RemoteError as error:
                waited = time.monotonic() - began
                if (left := start_seconds - waited) <= 0:
                    text = f"servers: {url} is not up after {start_seconds:g} s ({error}); {_START}"
                    raise ConfigError(f"{text}, or let it take longer with start_seconds=60.") from error
                on_wait(f"waiting for {url}, {left:.0f} s more: {error}")
        try:
            limit = await self._check_model(server)
            await server.bring()
            await self._check_logprobs(server)
        except ConfigError:
            raise
        except RemoteError as error:
            if error.status == 401:
                raise ConfigError(f"token: {error}.") from error
            raise ConfigError(f"servers: {url} cannot take new weights ({error}); {_START}.") from error
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"servers: {url} does not answer as a vLLM server does ({error!r}); {_START}.") from error
        server.greet()
        return limit

    async def _check_model(self, server: Server) -> int:
        """The server's limit of tokens, if it serves the right model."""
        url = server.remote.url
        cards = (await server.remote.call("GET", "/v1/models", seconds=CONTROL))["data"]
        (card,) = (card for card in cards if not card.get("parent"))
        if not same_model(card["root"], self._model):
            raise ConfigError(
                f"servers: {url} serves {card['root']!r}, not {self._model!r}; start it with that `--model`."
            )
        return int(card["max_model_len"])

    async def _check_logprobs(self, server: Server) -> None:
        # Under top-k 1 the sampled token has probability 1, unless log-probabilities ignore the sampling.
        probe = request(np.zeros(1, np.int32), Sampling(top_k=1), 1, 0)
        answer = await server.remote.call("POST", "/inference/v1/generate", probe, seconds=CONTROL)
        if abs(answer["choices"][0]["logprobs"]["content"][0]["logprob"]) > 1e-3:
            url = server.remote.url
            raise ConfigError(f"servers: {url} reports raw log-probabilities, without temperature and top-k; {_START}.")

    async def _dtype(self) -> torch.dtype:
        """What the servers compute in."""
        import torch

        names = {str(name) for server in self.servers for name in await server.rpc("llm_gym_dtype")}
        if len(names) > 1:
            raise ConfigError(f"servers: they compute in {' and '.join(sorted(names))}; start all with one dtype.")
        found = getattr(torch, names.pop().removeprefix("torch."))
        assert isinstance(found, torch.dtype)
        return found

    async def _disconnect(self) -> None:
        for server in getattr(self, "servers", []):
            await server.leave()
            await server.remote.close()

    def _changed(self) -> None:
        if any(server.ready or server.taken for server in self.servers):
            self._any.set()
        else:
            self._any.clear()
