"""One vLLM server of several: which weights it must serve, whether it is there, and how it comes back.

Weights are known by a label, which the server's workers keep and which marks the tokens they sample. A server that
restarted has lost it: it is told the weights again before it gets any request, and an answer whose tokens
carry another label never counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from llm_gym.access import bearing
from llm_gym.concurrency import tries
from llm_gym.core import Completion
from llm_gym.errors import ConfigError
from llm_gym.policies.http import Remote, RemoteError
from llm_gym.policies.vllm_server.delivery import Delivery
from llm_gym.policies.vllm_server.labels import Weights, owner, read
from llm_gym.policies.vllm_server.routing import Prefixes

T = TypeVar("T")

ADAPTER = "llm_gym"
"""The name under which requests ask for the adapter."""
CHANGING = "changing"
"""The label of weights that are half loaded."""
CONTROL, LOADING = 30.0, 900.0
"""Most seconds for a question about the server, and for new weights."""
LEAVING = 2.0
"""Most seconds that a server is waited for at the end."""
HEARTBEAT = 5.0
"""Seconds between looks at a server that has requests under way; one that hangs closes no connection."""
IDLE = 2.0
"""Seconds of silence after which a server is asked for its label first; none restarts in less."""
SAY = 15.0
"""Seconds between two lines about a server that stays away."""

Role = Literal["alone", "leader", "follower"]
"""Of several processes with the same servers the leader alone gives them weights, and followers wait for that."""

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """Processes that sample from the same servers (`harness.distributed.world.World`)."""

    rank: int
    size: int

    def on_rank0(self, make: Callable[[], T], what: str) -> T:
        """What `make` gives, or raises, on rank 0 alone; on every rank."""
        ...


class Taken(ConfigError):
    """Another run gives the server its weights: going on would be each loading over the other's for ever."""


class Server:
    """One server; everything here runs in the policy's event loop.

    Args:
        url: where it is.
        want: what it must serve now.
        changed: called when `ready` changes.
        role: whether this process gives it weights.
        token: what it asks for; empty: nothing.
    """

    def __init__(
        self,
        url: str,
        want: Callable[[], Weights],
        changed: Callable[[], None],
        role: Role = "alone",
        token: str = "",
    ) -> None:
        self.remote, self.role = Remote(url, headers=bearing(token)), role
        self.ready = False
        self.taken: Taken | None = None
        """Why it will not be ready again."""
        self._ours = False
        self.load = 0
        """Requests that were given to it, and have no answer yet."""
        self._sent = 0
        self.prefixes = Prefixes()
        self.reason = "it has not answered yet"
        """What the last failure was."""
        self.seconds: dict[str, float] = {}
        """What the last new weights took: `transfer`, until it could read them; `pause`, while requests were held."""
        self._paused = 0.0
        self._want, self._changed = want, changed
        self._delivery = Delivery(self.remote, self.rpc, want().run.partition(".")[0])
        self._lock = asyncio.Lock()
        self._gone = asyncio.Event()
        self._revival: asyncio.Task[None] | None = None
        self._heard = 0.0
        self._repeats = 0

    # Requests

    async def ask(self, body: dict[str, Any]) -> Completion:
        """One whole completion.

        Raises:
            RemoteError: there is none; if `passing`, the request may be repeated, here or elsewhere.
        """
        self.load += 1  # before anything is waited for: whoever chooses a server next must see it
        try:
            idle = not self._sent and time.monotonic() - self._heard > IDLE
            if idle and await self.label() != self._want().label:
                raise RemoteError(f"{self.remote.url} serves other weights")
            before = self._want()
            answer = await self._send(body)
        finally:
            self.load -= 1
        self._heard = time.monotonic()
        only = before if before.label == self._want().label else None
        return read(answer, only, before.run)

    async def _send(self, body: dict[str, Any]) -> Any:
        self._sent += 1
        try:
            return await self._unless_gone(body)
        except RemoteError as error:
            # It restarted, with another token, or does not know the adapter any more.
            if error.status == 401 or (error.status == 404 and "model" in body):
                raise RemoteError(str(error)) from error
            raise
        finally:
            self._sent -= 1

    async def _unless_gone(self, body: dict[str, Any]) -> Any:
        """The answer, unless the server is found to be gone first."""
        gone = asyncio.ensure_future(self._gone.wait())
        call = asyncio.ensure_future(self.remote.call("POST", "/inference/v1/generate", body))
        try:
            await asyncio.wait({call, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise RemoteError(self.reason)
            return call.result()
        finally:
            gone.cancel()
            if not call.done():
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError, RemoteError):
                    await call  # the connection is closed when this returns: the server then aborts the request

    def repeated(self) -> None:
        """A request that was here is going to be repeated."""
        self._repeats += 1

    # Weights

    async def label(self) -> str:
        """The label of the weights that it serves; empty after a start."""
        labels = set(await self.rpc("llm_gym_label"))
        return str(labels.pop()) if len(labels) == 1 else CHANGING

    async def bring(self) -> bool:
        """Makes it serve what is wanted, if it does not; whether weights had to be sent.

        Requests under way are held meanwhile and go on with the new weights, their caches recomputed.

        Raises:
            RemoteError: it cannot be reached, or cannot load them; for a follower: it does not serve them yet.
            Taken: it is, or has become, another run's.
        """
        if self.role == "follower":
            if await self.label() != self._want().label:
                raise RemoteError(f"{self.remote.url} serves other weights")
            return False
        async with self._lock:
            sent, want = False, None
            while want is not self._want():  # new ones may be wanted until the last answer is there
                while (held := await self.label()) != (want := self._want()).label:
                    self._look_whose(held)
                    await self._change(want, held)
                    sent = sent or bool(held or want.update)
                await self._post("/resume")  # also where nothing was sent: whoever paused it may be dead
                if self._paused:
                    self.seconds["pause"], self._paused = time.monotonic() - self._paused, 0.0
            self._heard = time.monotonic()
            self._ours = True
            return sent

    def _look_whose(self, held: str) -> None:
        """Refuses to load over the weights of another run that is alive, as far as one can tell.

        What a run that has ended left behind is anybody's; once the server was ours, whoever came later is alive.
        """
        run = held.partition(":")[0]
        if run in ("", CHANGING, self._want().run):
            return
        who, alive = owner(run)
        if self._ours or alive:
            how = "has been taken over by" if self._ours else "is in use by"
            raise Taken(
                f"servers: {self.remote.url} {how} {who}, which loads its own weights there; start another server "
                "with `llmgym serve --port 0`, one for each run."
            )

    async def _change(self, want: Weights, held: str) -> None:
        """Replaces weights under a pause, which ends only here if that fails; what has to travel does so before it."""
        base = () if want.on(held) else (want.source,)
        try:
            began = time.monotonic()
            places = await self._delivery.deliver(filter(None, (*base, want.adapter)))
            self._paused = time.monotonic()
            self.seconds = {"transfer": self._paused - began}
            await self._post("/pause", params={"mode": "keep"})
            try:
                await self._replace(want, held, places)
            except BaseException:
                with contextlib.suppress(RemoteError):
                    await self._post("/resume")  # what is sampled now carries no label that counts
                raise
        finally:
            await self._delivery.remove()

    async def _replace(self, want: Weights, held: str, places: Mapping[Path, Path]) -> None:
        await self._mark(f"{want.run}:{CHANGING}")
        if not want.on(held):
            if want.transfer is not None:
                await want.transfer.receive(self)
            elif want.source is None:
                await self.rpc("llm_gym_load_start", seconds=LOADING)
            else:
                await self.rpc("llm_gym_load_file", str(places[want.source]), seconds=LOADING)
        if want.adapter is not None:
            await self._load_adapter(want.adapter, places[want.adapter])
        done = await self._post("/reset_prefix_cache", params={"reset_running_requests": "true"})
        if not done["success"]:
            raise RemoteError(f"{self.remote.url} could not reset its prefix cache after a weight update", 500)
        self.prefixes.clear()
        await self._mark(want.label)

    async def _load_adapter(self, folder: Path, place: Path) -> None:
        """Makes the adapter's name known the first time (vLLM gives it number 1), then loads its tensors in place.

        Args:
            folder: PEFT's, here.
            place: the same where the server reads it.
        """
        cards = (await self.remote.call("GET", "/v1/models", seconds=CONTROL))["data"]
        names = [card["id"] for card in cards if card.get("parent")]
        if any(name != ADAPTER for name in names):
            raise RemoteError(f"{self.remote.url} serves adapters of its own, {names}; it must have none", 409)
        if not names:
            named = {"lora_name": ADAPTER, "lora_path": str(place)}
            await self._post("/v1/load_lora_adapter", named, seconds=LOADING, plain=True)
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        await self.rpc("llm_gym_load_adapter_file", str(place / "adapter_model.safetensors"), config, seconds=LOADING)

    async def _mark(self, label: str) -> None:
        try:
            await self._post("/update_weight_version", {"new_version": label})
        except RemoteError as error:
            if error.status != 404:  # a vLLM without versions
                raise
        await self.rpc("llm_gym_set_label", label)

    async def leave(self) -> None:
        """Says that its weights are nobody's any more: another run may load its own, though this process lives on."""
        if self.ready and self._ours and self.role != "follower":
            run, _, rest = self._want().label.partition(":")
            with contextlib.suppress(RemoteError, TimeoutError):
                async with asyncio.timeout(LEAVING):  # one that hangs must not hold up the end
                    await self.rpc("llm_gym_set_label", f"{run.partition('.')[0]}:{rest}")

    async def rpc(self, method: str, *args: Any, seconds: float = CONTROL) -> list[Any]:
        """The workers' answers to a method of the extension."""
        body = {"method": method, "args": args, "timeout": seconds}
        answer = await self._post("/collective_rpc", body, seconds=seconds + CONTROL)
        found: list[Any] = (answer or {}).get("results", [])
        return found

    async def _post(self, path: str, body: Any = None, *, seconds: float = CONTROL, **options: Any) -> Any:
        return await self.remote.call("POST", path, body, seconds=seconds, **options)

    # Coming back

    async def refuses(self, error: RemoteError) -> bool:
        """Whether this was its answer; one that has lost its engine answers too, until it ends."""
        if error.status is None:
            return False
        try:
            await self.remote.call("GET", "/health", seconds=CONTROL)
        except RemoteError:
            return False
        return True

    def doubt(self, error: RemoteError, *, gone: bool = False) -> None:
        """Something failed: no more requests until it has proved that it is there and serves the right weights.

        With `gone`, nothing is hoped for any more from the requests that are there.
        """
        self.reason = str(error)
        if gone:
            self._lose()
        if self._revival is None:
            self._be(False)
            self._revival = asyncio.ensure_future(self._revive())

    def _lose(self) -> None:
        if not self._gone.is_set():
            log.warning("lost %s (%s); its %d requests will be repeated", self.remote.url, self.reason, self.load)
            self._gone.set()

    async def _revive(self) -> None:
        began = said = time.monotonic()
        async for _ in tries():
            try:
                await self.remote.call("GET", "/health", seconds=CONTROL)
                sent = await self.bring()
                break
            except Taken as error:
                self.taken, self.reason = error, str(error)
                self._lose()
                self._be(False)
                return
            except Exception as error:  # whatever it is: this is the only way back
                self.reason = str(error) if isinstance(error, RemoteError) else repr(error)
                self._lose()
                if time.monotonic() - said > SAY:
                    said = time.monotonic()
                    log.warning("waiting for %s for %.0f s (%s)", self.remote.url, said - began, self.reason)
        if sent or self._gone.is_set():
            held = f"weights of version {self._want().version} sent again" if sent else "it still has its weights"
            away = time.monotonic() - began
            log.warning("%s is back after %.1f s; %s, %d requests repeated", self.remote.url, away, held, self._repeats)
            self._repeats = 0
        self._gone.clear()
        self._revival = None
        self._be(True)

    async def watch(self) -> None:
        """Looks now and then whether it still answers while requests are under way; runs for ever.

        A leader always looks, and at the weights too: followers wait for it to bring a server back.
        """
        while True:
            await asyncio.sleep(HEARTBEAT)
            if self.ready and (self.load or self.role == "leader"):
                try:
                    await self.remote.call("GET", "/health", seconds=CONTROL)
                    if self.role == "leader" and await self.label() != self._want().label:
                        self.doubt(RemoteError(f"{self.remote.url} serves other weights"))
                except RemoteError as error:
                    self.doubt(error, gone=True)

    def greet(self) -> None:
        """The server is there and serves what is wanted."""
        self._be(True)

    def _be(self, ready: bool) -> None:
        self.ready = ready
        self._changed()
