"""Several processes, as far as threads and forks can show; many more ranks are in tests/heavy (ranks, nproc)."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from forks import in_ranks
from hypothesis import given
from hypothesis import strategies as st
from small_models import qwen3, samples
from torch.distributed import TCPStore
from torch.distributed.tensor import DTensor

from llm_gym.errors import ConfigError, RankError
from llm_gym.harness.batching.packing import pack, trained_tokens
from llm_gym.harness.batching.shards import deal, dummy_batches, pack_shard
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.distributed import heartbeat, world
from llm_gym.harness.distributed.heartbeat import Watch
from llm_gym.harness.distributed.world import ParallelConfig, World
from llm_gym.harness.learner import weights
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.loading import load_model, plain_tensors
from llm_gym.harness.model.lora import LoraConfig
from llm_gym.harness.settings import load
from llm_gym.harness.weight_sync.engines import check


class Told(World):
    """A rank that is told what all ranks say, in place of asking them."""

    def __init__(self, rank: int, size: int, said: Callable[[Any], list[Any]], strategy: str = "ddp") -> None:
        super().__init__(rank, size, ParallelConfig(strategy))  # type: ignore[arg-type]
        self.said = said

    def gather(self, value: Any, what: str) -> list[Any]:
        return self.said(value)


# Alone


def test_alone_everything_is_the_identity() -> None:
    world = World()
    assert world.shard([3, 1, 2]) == [3, 1, 2]
    assert world.unshard([3, 1, 2], "x", each=1) == [3, 1, 2]
    assert world.gather("a", "x") == ["a"]
    assert world.on_rank0(lambda: 7, "x") == 7
    assert world.reduce_max({"a": 1.5, "b": "c"}, "x") == {"a": 1.5, "b": "c"}
    assert world.add({"a": 1.5}, "x") == {"a": 1.5}
    assert dummy_batches(world, 0) == []
    assert not World(config=ParallelConfig("fsdp")).sharded


def test_a_parameter_without_a_gradient_keeps_none() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    World().sum_gradients([parameter])
    assert parameter.grad is None


# Shares


@given(st.lists(st.integers(), max_size=30), st.integers(1, 5), st.integers(1, 3))
def test_what_is_dealt_comes_back_in_order(seeds: list[int], size: int, each: int) -> None:
    """Groups stay whole on a rank, and the order is that of one process."""
    shares = [[(s, m) for s in World(rank, size).shard(seeds) for m in range(each)] for rank in range(size)]
    for rank in range(size):
        together = Told(rank, size, lambda value: shares).unshard(shares[rank], "x", each=each)
        assert together == [(s, m) for s in seeds for m in range(each)]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 100))
def test_shares_of_a_batch_are_all_of_it_once(lengths: list[int], size: int, budget: int) -> None:
    whole, counts = pack(samples(lengths), max_tokens=10**6), trained_tokens(samples(lengths))
    worlds = [Told(r, size, lambda value: [counts]) for r in range(size)]
    shares = [pack_shard(world, deal(world, samples(lengths)), max_tokens=budget) for world in worlds]
    assert {(b.tokens, b.episodes) for b in shares} == {(whole.tokens, whole.episodes)}
    for name in ("target", "weight", "advantages"):
        dealt = sorted(x for b in shares for m in b.micro for x in m.streams[name].tolist())
        assert dealt == sorted(x for m in whole.micro for x in m.streams[name].tolist())
    loads = [sum(len(m.tokens) for m in b.micro) for b in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_an_error_of_the_first_is_raised_by_all() -> None:
    error = ConfigError("x")
    with pytest.raises(ConfigError, match="x"):
        Told(1, 2, lambda value: [error, None]).on_rank0(lambda: 1, "y")


def test_where_one_fails_all_raise_what_came_first() -> None:
    """Also those that did not fail, and those that only failed because it did."""
    first, then = ConfigError("first"), RankError("then")
    said: list[Any] = [(False, 2.0, then), None, (False, 1.0, first), (True, 0.5, then)]
    for rank in (0, 1, 2):
        with pytest.raises(ConfigError, match="first"):
            Told(rank, 3, lambda value: said).on_all_ranks(lambda: 1, "x")
    assert Told(0, 2, lambda value: [value, None]).on_all_ranks(lambda: 7, "x") == 7

    def fail() -> None:
        raise first

    with pytest.raises(ConfigError, match="first"):
        Told(0, 2, lambda value: [value, None]).on_all_ranks(fail, "x")

    def lose() -> None:
        raise RankError("[gloo] Connection closed by peer")

    with pytest.raises(ConfigError, match="first"):
        Told(0, 2, lambda value: [value, (False, float("inf"), first)]).on_all_ranks(lose, "x")


def test_metrics_are_summed_by_name_or_the_worst() -> None:
    world = Told(0, 2, lambda value: [value, {"a": 2.0, "b": 1.0}])
    assert world.add({"a": 1.0}, "x") == {"a": 3.0, "b": 1.0}
    assert world.reduce_max({"a": 1.0, "mode": "p"}, "x") == {"a": 2.0, "mode": "p"}


def test_idle_passes_weigh_nothing() -> None:
    """A rank with less work runs as often as the others, and its gradient stays what it was."""
    busy = Told(0, 2, lambda value: [value, 3], "fsdp")
    idle = dummy_batches(busy, 1)
    assert [len(m.tokens) for m in idle] == [1, 1]
    assert dummy_batches(World(), 1) == dummy_batches(Told(0, 2, lambda value: [value, 3]), 1) == []
    learner = Learner(qwen3())
    for micro in idle:
        learner.backward(micro, 1.0)
    assert all(not p.grad.any() for p in learner.model.parameters() if p.grad is not None)


# Real ranks


def test_gradients_are_summed_over_ranks() -> None:
    """Not averaged; a rank without one counts as zero, and where no rank has one it stays so."""

    def work(world: World) -> list[list[float] | None]:
        both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
        both.grad = torch.tensor([1.0, 2.0]) * (world.rank + 1)
        if world.rank == 1:
            one.grad = torch.tensor([5.0, 0.0])
        world.sum_gradients([both, one, none])
        return [None if p.grad is None else p.grad.tolist() for p in (both, one, none)]

    assert in_ranks(3, work) == [[[6.0, 12.0], [5.0, 0.0], None]] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one(strategy: str, optimizer: str) -> None:
    """Loss, entropy and gradient norm of three steps in float64; all presets and shares are in tests/heavy."""

    def work(world: World) -> list[dict[str, float]]:
        settings = OptimizerConfig(optimizer, lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=1e3)
        learner = Learner(qwen3(dtype=torch.float64), settings, total_steps=4, world=world)
        batch = pack_shard(world, deal(world, samples([9, 14, 5, 11, 8])), max_tokens=20)
        return [learner.step(batch) for _ in range(3)]

    alone = work(World())
    assert alone[2]["policy/grad_norm"] != pytest.approx(alone[0]["policy/grad_norm"], rel=1e-3)
    for steps in in_ranks(2, work, strategy):
        for step, want in zip(steps, alone, strict=True):
            assert step == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("lora", "all-linear"), ("dora", "all-linear"), ("lora", ("embed_tokens", "lm_head", "q_proj"))],
)
def test_weights_of_4_bits_are_split_too(kind: str, targets: Any) -> None:
    """Each rank holds half of them, takes the steps of one process, and sends the engine the same tensors."""
    pytest.importorskip("bitsandbytes")

    def work(world: World) -> tuple[list[dict[str, float]], dict[str, float], int]:
        torch.manual_seed(0)  # adapters are drawn
        model = load_model(lora=LoraConfig(rank=4, kind=kind, base="nf4", target_modules=targets))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        learner = Learner(model, OptimizerConfig(lr=1e-2), total_steps=4, world=world)
        batch = pack_shard(world, deal(world, samples([9, 14, 5, 11, 8])), max_tokens=20)
        metrics = [learner.step(batch) for _ in range(3)]
        sent = {name: float(tensor.double().norm()) for name, tensor in plain_tensors(model)}
        held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters())
        return metrics, sent, held

    metrics, sent, held = work(World())
    for steps, tensors, part in in_ranks(2, work, "fsdp"):
        for step, want in zip(steps, metrics, strict=True):
            assert step == pytest.approx(want, rel=1e-3)  # on some processors rounding alone makes 2.5e-4 of it
        assert tensors == pytest.approx(sent, rel=1e-5)
        assert part <= 0.51 * held


def test_who_is_lost_while_a_split_model_is_saved_is_named(tmp_path) -> None:
    """Weights are gathered there: whoever waits for a part hears of a lost connection first."""

    def fail(model: Any) -> Any:
        raise OSError("the disk is full")

    def work(world: World) -> str:
        learner = Learner(qwen3(), total_steps=4, world=world)
        if world.rank == 1:
            weights.whole_state = fail
        try:
            weights.save(learner, None, tmp_path)
        except (OSError, RuntimeError, RankError) as error:
            world.close()
            return f"{type(error).__name__}: {error}"
        return "saved"

    first, second = in_ranks(2, work, "fsdp")
    assert second == "OSError: the disk is full"
    assert first == "RankError: rank 1 has left during 'checkpoint': OSError: the disk is full"


# What is refused


def test_what_cannot_work_is_refused_in_one_sentence() -> None:
    split = World(0, 2, ParallelConfig("fsdp"))
    with pytest.raises(ConfigError, match=r"policy.sync: 'shared' does not work.*split learner; valid: auto, copy"):
        check(load(TrainConfig, sets=["policy.sync=shared"]), split)
    with pytest.raises(ConfigError, match=r"policy.sync: 'disk' does not work.*split learner; valid: auto, file"):
        check(load(TrainConfig, sets=["policy.servers=[http://127.0.0.1:1]", "policy.sync=disk"]), split)
    with pytest.raises(ConfigError, match="parallel.timeout: got 0.0"):
        load(TrainConfig, sets=["parallel.timeout=0"])
    with pytest.raises(ConfigError, match="did you mean 'fsdp'"):
        load(TrainConfig, sets=["parallel.strategy=fsdp2"])


# Who is missing


@pytest.mark.parametrize(("timeout", "seconds"), [(20, 600), (1800, 1800)])
def test_processes_have_ten_minutes_to_come_however_short_steps_are(timeout: float, seconds: int, monkeypatch) -> None:
    """They load torch at their own pace, which says nothing about a step's."""

    def nobody(url: str, timeout: datetime.timedelta) -> Iterator[Any]:
        assert timeout.total_seconds() == seconds
        raise torch.distributed.DistError("timed out")

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "rendezvous", nobody)
    monkeypatch.setattr(world.Stores, "base", None)
    monkeypatch.setattr(world.Stores, "count", 0)
    with pytest.raises(RankError, match=f"rank 1: the other processes did not come within {seconds} s"):
        world.connect(ParallelConfig(timeout=timeout))


@pytest.fixture
def store() -> Iterator[Callable[[], TCPStore]]:
    """Makes clients of one real store."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False, timeout=datetime.timedelta(seconds=60))


@pytest.fixture
def watches(store: Callable[[], TCPStore]) -> Iterator[Callable[..., list[Watch]]]:
    """`watches(size, timeout)`: those of all ranks, in this process."""
    every: list[Watch] = []

    def make(size: int, timeout: float) -> list[Watch]:
        found: dict[int, Watch] = {}

        def one(rank: int) -> None:
            found[rank] = Watch(store(), rank, size, timeout)

        in_threads([lambda r=rank: one(r) for rank in range(size)])
        every.extend(found.values())
        return [found[rank] for rank in range(size)]

    yield make
    for each in every:
        each.stop()


def in_threads(functions: list[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_all_go_on_when_all_have_come(watches) -> None:
    three = watches(3, 60)
    for _ in range(3):
        in_threads([lambda w=w: w.wait("packing") for w in three])
    assert {w.number for w in three} == {3}


def test_who_does_not_come_is_named_with_where_it_was_last(watches) -> None:
    first, second, third = watches(3, 60)
    in_threads([lambda w=w: w.wait("rollout") for w in (first, second, third)])
    first.timeout = 0.3  # not before: all are to come, however long this machine takes
    with pytest.raises(RankError, match=r"rank 1, 2 did not come to 'packing' within 0.3 s: stuck after 'rollout'"):
        first.wait("packing")


def test_who_leaves_is_named_at_once_with_the_reason(watches) -> None:
    first, second = watches(2, 600)
    try:
        raise ValueError("no such seed")
    except ValueError:
        second.stop()
    with pytest.raises(RankError, match="rank 1 has left during 'packing': ValueError: no such seed"):
        first.wait("packing")
    with pytest.raises(RankError, match="rank 1 has left"):
        first.blame("packing")


def test_who_gives_no_sign_of_life_is_named_long_before_time_is_up(watches, monkeypatch) -> None:
    first, second = watches(2, 600)
    monkeypatch.setattr(heartbeat, "LOST", 3.0)
    second.over.set()  # as if its process had stopped
    second.thread.join()
    with pytest.raises(RankError, match="rank 1 is gone: no sign of life for 3 s, during 'packing'"):
        first.wait("packing")


ORPHAN = """
import sys, threading
from torch.distributed import TCPStore
from llm_gym.errors import RankError
from llm_gym.harness.distributed import heartbeat, world
from llm_gym.harness.learner import weights

heartbeat.BEAT, heartbeat.GRACE = 0.01, float(sys.argv[3])
held = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
mine = heartbeat.Watch(held, 1, 2, 600)
print("begun", flush=True)
try:
    mine.wait("packing") if sys.argv[2] == "waits" else threading.Event().wait()
except RankError as error:
    mine.stop()
    sys.exit(f"Error: {error}")
"""
HOLDING = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
for key in ("at", "beat"):
    store.set(f"{key}/0", '{"number": 0, "what": "the start", "left": null}')
print(store.port, flush=True)
input()
"""


@pytest.mark.parametrize(
    ("busy", "grace", "said"),
    [
        ("waits", "600", "Error: rank 0, or what started the processes, is gone: the store does not answer."),
        ("computes", "0", "rank 1: rank 0, or what started the processes, is gone; stopping."),
    ],
)
def test_who_loses_the_store_says_so_once_and_ends(busy: str, grace: str, said: str) -> None:
    """Where it waits for others by the error of that; where it does not, all the same."""
    quiet = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDING], **pipes) as holder:
        port = holder.stdout.readline().strip()  # type: ignore[union-attr]
        with subprocess.Popen([sys.executable, "-c", ORPHAN, port, busy, grace], **pipes, env=quiet) as orphan:
            try:
                assert orphan.stdout.readline() == "begun\n"  # type: ignore[union-attr]
                holder.kill()
                _, errors = orphan.communicate(timeout=120)
            finally:
                orphan.kill()
                holder.kill()
    assert errors.splitlines() == [said]
    assert orphan.returncode not in (0, -signal.SIGKILL)


def test_silence_lasts_as_long_as_the_same_beat(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    pulse = heartbeat.Pulse()
    silences = []
    for now, beat in ((100, b"5"), (107, b"5"), (111, b"6"), (140, b"6")):  # noqa: B007, the clock reads `now`
        silences.append(pulse.silence(3, beat))
    assert silences == [0, 7, 0, 29]
    assert pulse.silence(4, b"6") == 0
