"""Several processes with the same servers, as threads: one gives the weights, all sample with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_server import CONTEXT, MODEL, WEIGHTS, Fake, ask

from llm_gym.core import Sampling
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.policies.vllm_server import state
from llm_gym.policies.vllm_server.policy import ServerPolicy


class Rank:
    """One thread's view of all of them."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, said: list[Any]) -> None:
        self.rank, self.size, self._meeting, self._said = rank, size, meeting, said

    def on_rank0(self, make: Callable[[], Any], what: str) -> Any:
        if self.rank == 0:
            try:
                self._said[:] = [make()]
            except Exception as error:
                self._said[:] = [error]
        self._meeting.wait()
        made = self._said[0]
        self._meeting.wait()
        if isinstance(made, Exception):
            raise made
        return made


def ranks(size: int) -> list[Rank]:
    meeting: threading.Barrier = threading.Barrier(size, timeout=60)
    said: list[Any] = []
    return [Rank(rank, size, meeting, said) for rank in range(size)]


def together(functions: list[Callable[[], Any]]) -> list[Any]:
    """What they give, each in a thread; the exception of the first that failed."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures: list[Future[Any]] = [pool.submit(function) for function in functions]
    return [future.result() for future in futures]


def policies(*servers: Fake, size: int = 2, **options: Any) -> list[ServerPolicy]:
    urls = [server.url for server in servers]
    return together([lambda r=r: ServerPolicy(MODEL, servers=urls, ranks=r, **options) for r in ranks(size)])


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "HEARTBEAT", 0.05)
    monkeypatch.setattr(state, "IDLE", 0.0)


@pytest.fixture
def fakes() -> Iterator[list[Fake]]:
    servers = [Fake(), Fake()]
    yield servers
    for server in servers:
        server.stop()


def close(every: list[ServerPolicy]) -> None:
    for policy in every:
        policy.close()


def test_the_first_alone_sends_weights_and_all_sample_with_them(fakes: list[Fake]) -> None:
    both = policies(*fakes)
    for fake in fakes:
        fake.calls.clear()
    asked: list[list[str]] = [[], []]

    def tensors(rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            asked[rank].append(name)
            yield name, tensor

    together([lambda r=r, p=p: p.load(tensors(r), version=3) for r, p in enumerate(both)])
    assert asked == [["w"], ["w"]], "those of a split model must be gathered by all"
    assert [fake.calls.count("llm_gym_load_file") for fake in fakes] == [1, 1]
    assert [policy.version for policy in both] == [3, 3]
    assert [ask(policy).version for policy in both] == [3, 3]
    close(both)


def test_requests_are_spread(fakes: list[Fake]) -> None:
    """A single request of each process does not go to the same server."""
    both = policies(*fakes)
    for policy in both:
        ask(policy)
    assert [len(fake.bodies) for fake in fakes] == [1, 1]
    assert {policy.max_rows for policy in both} == {128}
    close(both)


@pytest.mark.parametrize("seen", ["by its absence", "by its weights"])
def test_the_first_brings_a_server_back_for_the_others(fakes: list[Fake], seen: str) -> None:
    """Though it asks for nothing itself, and only they notice that the server has other weights."""
    fake = fakes[0]
    both = policies(fake)
    together([lambda p=p: p.load(WEIGHTS.items(), version=2) for p in both])
    if seen == "by its absence":
        fake.kill()
        while both[0].servers[0].ready:
            pass
        fake.calls.clear()  # before it is there again: the first may bring it back at once
        fake.start()
    else:
        fake.calls.clear()
        fake.label, fake.version = "", "default"
    assert both[1].generate([CONTEXT] * 3, Sampling())[0].version == 2
    assert fake.calls.count("llm_gym_load_file") == 1
    close(both)


def test_what_the_first_meets_is_said_by_all(fakes: list[Fake]) -> None:
    with pytest.raises(ConfigError, match="serves 'a/model', not 'b/model'"):
        together(
            [lambda r=r: ServerPolicy("b/model", servers=fakes[0].url, ranks=r) for r in reversed(ranks(2))],
        )
    both = policies(fakes[0], retry_seconds=0.3)
    fakes[0].kill()

    def refused(policy: ServerPolicy) -> str:
        with pytest.raises(PolicyError) as raised:
            policy.load(WEIGHTS.items(), version=1)
        return str(raised.value)

    assert len(set(together([lambda p=p: refused(p) for p in both]))) == 1
    fakes[0].start()
    close(both)
