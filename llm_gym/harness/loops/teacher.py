"""Who a student learns from in distillation: a model in this process, or one behind vLLM servers.

A teacher reads the very ids that the student saw and sampled; so both must have the same tokenizer, which is
checked before anything is loaded.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_gym.access import bearing, token_of
from llm_gym.concurrency import Loop, tries
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.harness.model.divergence import Head, top_logprobs
from llm_gym.harness.model.heads import token_logprobs
from llm_gym.harness.model.loading import Backbone, load_model
from llm_gym.harness.types import MicroBatch
from llm_gym.policies.http import Remote, RemoteError
from llm_gym.tokenizer import load_tokenizer

UNKNOWN = -100.0
"""Log-probability of an id that the teacher's vocabulary does not hold."""
PROBES = ("Hello, world! 2+2=4\n\n\tdef f(x):", "Füße 東京 🙂 \u00a0naïve", "<|im_start|><tool_call></s>")
"""Texts that tell tokenizers apart."""
ATTEMPTS, CONTROL = 6, 60.0
"""Tries of one request, and seconds that an answer about the server may take."""


class Teacher(Protocol):
    """What distillation asks of a teacher."""

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the trained tokens, float32 [M]."""

    def top(self, batch: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids where each trained token stands, int64 [M, k], and their log-probabilities [M, k]."""

    def close(self) -> None:
        """Frees what it holds."""


class LocalTeacher:
    """A model in this process.

    Args:
        model: folder or hub id.
        device: where it computes.
        dtype: of its weights.
        temperature: the student's; both distributions are read at it.

    Raises:
        ConfigError: no such model.
    """

    def __init__(self, model: str, *, device: torch.device, dtype: torch.dtype, temperature: float = 1.0) -> None:
        self.backbone = Backbone(load_model(model, device=device, dtype=dtype).requires_grad_(False))
        self.temperature = temperature

    @torch.no_grad()
    def head(self, batch: MicroBatch) -> Head:
        """Its next-token distributions where the trained tokens stand, before they are computed."""
        batch = batch if self.backbone.shares else apart(batch)
        hidden = self.backbone.hidden(batch).index_select(0, batch.streams["source"])
        cap = None if self.backbone.softcap is None else self.backbone.softcap / self.backbone.scale
        return Head(hidden, *self.backbone.head(), self.temperature / self.backbone.scale, cap)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """As `Teacher`."""
        head = self.head(batch)
        known = batch.streams["target"] < len(head.weight)
        targets = torch.where(known, batch.streams["target"], 0)
        found, _ = token_logprobs(targets=targets, entropy=False, **head._asdict())
        return torch.where(known, found, UNKNOWN)

    def top(self, batch: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """As `Teacher`."""
        return top_logprobs(self.head(batch), k)

    def close(self) -> None:
        """Nothing to do."""


class UniformTeacher:
    """Finds all tokens equally likely, and knows none: takes the place of a served teacher where memory is measured."""

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """As `Teacher`: 0."""
        return torch.zeros(batch.trained, device=batch.tokens.device)

    def top(self, batch: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """As `Teacher`: the first k ids, at 1/(k + 1) each."""
        ids = torch.arange(k, device=batch.tokens.device).expand(batch.trained, k)
        return ids, torch.full(ids.shape, -math.log(k + 1.0), device=ids.device)

    def close(self) -> None:
        """Nothing to do."""


class ServedTeacher:
    """A model behind vLLM servers: they score token ids that they are given (`prompt_logprobs`).

    A token for them is the environment's LLM_GYM_TOKEN.

    A row must be shorter than the server's context by one token. Servers read at temperature 1.

    Args:
        servers: their addresses, separated by commas; requests go round.
        tokenizer: the student's.
        k: log-probabilities that will be asked for at each place.

    Raises:
        ConfigError: a server that does not answer, cannot score, or has another tokenizer.
    """

    def __init__(self, servers: str, tokenizer: Any, *, k: int = 0) -> None:
        self._servers = [Remote(url.strip(), headers=bearing(token_of(None))) for url in servers.split(",")]
        self._loop = Loop("llm_gym-teacher")
        self._turn = itertools.count()
        try:
            self._names = [self._loop.run(self._greet(server, tokenizer, k)) for server in self._servers]
        except BaseException:
            self.close()
            raise

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """As `Teacher`.

        Raises:
            PolicyError: no server answers, or one refuses a row.
        """
        found = [
            table[int(ids[at])]["logprob"]
            for ids, places, tables in self._scored(batch, 0)
            for at, table in zip(places.tolist(), tables, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32, device=batch.tokens.device)

    def top(self, batch: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """As `Teacher`.

        Raises:
            PolicyError: as `logprobs`.
        """
        best = [_best(table, k) for _, _, tables in self._scored(batch, k) for table in tables]
        device = batch.tokens.device
        ids = torch.tensor([[token for token, _ in each] for each in best], dtype=torch.int64, device=device)
        return ids.view(-1, k), torch.tensor([[value for _, value in each] for each in best], device=device).view(-1, k)

    def close(self) -> None:
        """Closes the connections."""

        async def disconnect() -> None:
            for server in self._servers:
                await server.close()

        self._loop.stop(disconnect)

    def _scored(self, batch: MicroBatch, k: int) -> list[tuple[Tensor, Tensor, list[dict[int, Any]]]]:
        """(ids, places of the trained ones, the server's table at each) of every sequence."""
        rows = sequences(batch)

        async def every() -> list[list[Any]]:
            return await asyncio.gather(*(self._score(ids.tolist(), k) for ids, _ in rows))

        tables = self._loop.run(every())
        return [
            (ids, places, [{int(token): entry for token, entry in table[at].items()} for at in places.tolist()])
            for (ids, places), table in zip(rows, tables, strict=True)
        ]

    async def _score(self, ids: list[int], k: int) -> list[Any]:
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": k, "temperature": 0.0}
        async for attempt in tries():
            number = next(self._turn) % len(self._servers)
            try:
                named = {**body, "model": self._names[number]}
                answer = await self._servers[number].call("POST", "/v1/completions", named)
                found: list[Any] = answer["choices"][0]["prompt_logprobs"]
                return found
            except RemoteError as error:
                if not error.passing or attempt + 1 >= ATTEMPTS:
                    raise PolicyError(f"The teacher cannot score a row: {error}") from error
        raise AssertionError

    async def _greet(self, server: Remote, tokenizer: Any, k: int) -> str:
        """The name of the model that it serves, if it can score our ids."""
        try:
            name = str((await server.call("GET", "/v1/models", seconds=CONTROL))["data"][0]["id"])
            for text in PROBES:
                asked = {"model": name, "prompt": text, "add_special_tokens": False}
                theirs = (await server.call("POST", "/tokenize", asked, seconds=CONTROL))["tokens"]
                ours = list(tokenizer.encode(text, add_special_tokens=False))
                if theirs != ours:
                    raise ConfigError(
                        f"distill.teacher: {server.url} has another tokenizer: {text!r} is {theirs} "
                        f"there and {ours} for the student."
                    )
            body = {"model": name, "prompt": ours, "max_tokens": 1, "prompt_logprobs": k}
            await server.call("POST", "/v1/completions", body, seconds=CONTROL)
        except RemoteError as error:
            raise ConfigError(f"distill.teacher: {server.url} cannot score tokens ({error}).") from error
        except (LookupError, TypeError) as error:
            raise ConfigError(f"distill.teacher: {server.url} does not answer as vLLM does ({error!r}).") from error
        return name


def sequences(batch: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """Each sequence of a packed batch on its own: its ids up to the last trained one [n], and where those stand [m]."""
    starts = torch.tensor([0, *itertools.accumulate(batch.lengths)])
    found = []
    for number in range(int(batch.streams["sequence"].max()) + 1 if batch.trained else 0):
        mine = batch.streams.at(batch.streams["sequence"] == number)
        source, last = mine["source"], mine["target"][-1:]
        piece = int(torch.searchsorted(starts, source[-1].cpu(), right=True)) - 1
        parts = [batch.tokens[starts[piece] : source[-1] + 1]]
        while batch.parents and (piece := batch.parents[piece]) >= 0:
            parts.append(batch.tokens[starts[piece] : starts[piece + 1]])
        found.append((torch.cat([*parts[::-1], last]), batch.positions[source] + 1))
    return found


def apart(batch: MicroBatch) -> MicroBatch:
    """The same trained tokens with no prompt shared, for a model that cannot read shared ones."""
    if not batch.parents:
        return batch
    rows = sequences(batch)
    lengths = tuple(len(ids) - 1 for ids, _ in rows)
    starts = [0, *itertools.accumulate(lengths)]
    source = torch.cat([places - 1 + start for (_, places), start in zip(rows, starts, strict=False)])
    return replace(
        batch,
        tokens=torch.cat([ids[:-1] for ids, _ in rows]),
        positions=torch.cat([torch.arange(n, device=batch.tokens.device) for n in lengths]),
        lengths=lengths,
        streams=batch.streams.having(source=source),
        parents=(),
    )


def check_tokenizers(student: str | None, teacher: str | None) -> None:
    """Looks whether every id means the same to both.

    Raises:
        SettingError: it does not; or one of them cannot be loaded.
    """
    mine, other = load_tokenizer(student).get_vocab(), load_tokenizer(teacher).get_vocab()
    names = {number: token for token, number in other.items()}
    for token, number in sorted(mine.items(), key=lambda pair: pair[1]):
        if names.get(number) != token:
            raise ConfigError(
                f"distill.teacher: {teacher!r} has another tokenizer than the student: id {number} is {token!r} for "
                f"the student and {names.get(number)!r} for the teacher."
            )
    if len(other) > len(mine):
        raise ConfigError(f"distill.teacher: {teacher!r} has {len(other)} tokens, the student {len(mine)}.")


def _best(table: Mapping[int, Any], k: int) -> list[tuple[int, float]]:
    """The k likeliest (id, log-probability) of a server's table, which also holds the token that is there."""
    return sorted(((token, entry["logprob"]) for token, entry in table.items()), key=lambda pair: -pair[1])[:k]
