"""Starts processes as torchrun does; as a program, takes the same optimizer steps in each: `python ranks.py <out> <setup> ...`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "harness"))

from forks import reserved  # noqa: E402
from small_models import qwen3  # noqa: E402
from test_presets import prepared  # noqa: E402

from llm_gym.harness.algorithms.presets import PRESETS  # noqa: E402
from llm_gym.harness.batching.packing import Batch, pack  # noqa: E402
from llm_gym.harness.batching.shards import deal, pack_shard  # noqa: E402
from llm_gym.harness.config import TrainConfig  # noqa: E402
from llm_gym.harness.distributed.fsdp import split_as, whole  # noqa: E402
from llm_gym.harness.distributed.world import ParallelConfig, World, connect  # noqa: E402
from llm_gym.harness.learner.learner import Learner  # noqa: E402
from llm_gym.harness.learner.optimizers import OPTIMIZERS, OptimizerConfig  # noqa: E402
from llm_gym.harness.learner.weights import restore, save  # noqa: E402
from llm_gym.harness.model.loading import prepare  # noqa: E402
from llm_gym.harness.model.lora import LoraConfig  # noqa: E402
from llm_gym.harness.model.memory import MemoryConfig, apply_memory_config  # noqa: E402
from llm_gym.harness.settings import load  # noqa: E402


def start(command: Sequence[str], size: int, **popen: Any) -> list[subprocess.Popen[str]]:
    """`command` as ranks 0 to size - 1, with torchrun's variables; rank 0 holds the store."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": str(size)}
    with reserved() as port:  # each rank keeps it reserved as long as it lives
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
        mine: list[dict[str, Any]] = [{"env": base | {"RANK": str(r), "LOCAL_RANK": str(r)}} for r in range(size)]
        return [subprocess.Popen(command, **each, pass_fds=[port.fileno()], text=True, **popen) for each in mine]


def run(program: str, jobs: Sequence[tuple[int, Sequence[str]]], *, timeout: float = 500) -> None:
    """Runs `program` once for each (number of ranks, arguments), to its end; none is left behind.

    The ranks are not forked from a process that has imported torch, though that would save their imports: of three whole
    runs with forked ranks one ended in a broken heap.
    """
    for size, arguments in jobs:
        with tempfile.TemporaryFile("w+") as said:
            pipes: Any = {"stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
            ranks = start([sys.executable, program, *arguments], size, **pipes)
            try:
                ends = [rank.wait(timeout) for rank in ranks]
            finally:
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(rank.pid, signal.SIGKILL)
                    rank.wait()
            said.seek(0)
            assert not any(ends), said.read()[-10_000:]


# The program


class Case(NamedTuple):
    """What is trained, and how."""

    preset: str = "grpo"
    dtype: str = "float64"
    sets: tuple[str, ...] = ()
    lora: bool = False
    optimizer: str = "adamw"
    memory: MemoryConfig = MemoryConfig()


KL = ("loss.kl=k3", "loss.kl_weight=0.5")
CASES = {
    **{name: Case(name) for name in PRESETS},
    "float32": Case(dtype="float32"),
    "lora": Case(lora=True),
    "reference": Case(sets=KL),
    "lora, reference": Case(sets=KL, lora=True),
    "correction": Case(sets=("loss.correction.name=mis", "loss.correction.level=sequence")),
    "muon": Case(optimizer="muon"),
    "adafactor": Case(optimizer="adafactor"),
    "checkpointing": Case(memory=MemoryConfig(checkpointing=1)),
    "some layers": Case(memory=MemoryConfig(train_layers="-1")),
}


def model_of(case: Case) -> Any:
    model = qwen3(dtype=getattr(torch, case.dtype))
    apply_memory_config(model, case.memory)
    if case.lora:
        torch.manual_seed(1)
        model = prepare(model, lora=LoraConfig(rank=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@cache
def drawn(preset: str, dtype: str) -> Any:
    """The rows that are trained on; nothing changes them."""
    return prepared(preset, qwen3(dtype=getattr(torch, dtype)))[1]


def two_steps(case: Case, world: World, share: str) -> dict[str, Any]:
    """Gradients of the first optimizer step, weights after the second, metrics of both."""
    rows = drawn(case.preset, case.dtype)
    loss = load(TrainConfig, preset=case.preset, sets=["loss.constant_length=20", *case.sets]).loss
    how = {"normaliser": loss.normaliser, "constant_length": loss.constant_length, "share": True}
    settings = OptimizerConfig(case.optimizer, lr=1e-2, eps=1e-3, max_grad_norm=1e3, weight_decay=0.1)
    model = model_of(case)
    learner = Learner(model, settings, loss, total_steps=4, world=world)
    gradients: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name, whole(parameter.grad).clone())

    learner.optimizers[0].register_step_pre_hook(keep)
    batch = (
        pack_shard(world, deal(world, rows), max_tokens=50, **how) if share == "dealt" else by_hand(rows, world, how)
    )
    if case.sets[:1] == ("loss.correction.name=mis",):
        batch = learner.compute_proximal_logprobs(batch)
    metrics = [learner.step(batch), learner.step(batch)]
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    passes = world.gather(len(batch.micro), "passes")
    return {"gradients": gradients, "weights": weights, "metrics": metrics, "passes": passes}


def by_hand(rows: Any, world: World, how: Any) -> Batch:
    """Eight micro-batches: seven and one on two ranks; five, three and none on three."""
    batch = pack(rows, max_tokens=1, **how)
    assert len(batch.micro) == 8
    cuts = {1: [slice(None)], 2: [slice(0, 7), slice(7, None)], 3: [slice(0, 5), slice(5, None), slice(0, 0)]}
    return replace(batch, micro=batch.micro[cuts[world.size][world.rank]])


WHOLE = tuple(n for n in ("muon", "adafactor", "adamw8bit") if find_spec(OPTIMIZERS[n].package or "torch"))
"""Optimizers that look at more than one element, as far as they are installed."""


def drawn_steps(learner: Learner, numbers: range) -> None:
    """Optimizer steps whose gradients are drawn: the same to the last bit on any number of processes."""
    for number in numbers:
        torch.manual_seed(number)
        for parameter in learner.model.parameters():
            parameter.grad = split_as(torch.randn(parameter.shape), parameter)
        for optimizer in learner.optimizers:
            optimizer.step()


def four_steps(name: str, world: World, folder: Path, source: Path | None = None) -> dict[str, Any]:
    """The weights after four drawn steps, with a checkpoint after two; or after the last two, from `source`."""
    model = qwen3(hidden_size=64, intermediate_size=96)  # some matrices are large enough for moments in 8 bits
    learner = Learner(model, OptimizerConfig(name, lr=1e-2, weight_decay=0.1), total_steps=4, world=world)
    if source is None:
        drawn_steps(learner, range(2))
        folder.mkdir(parents=True, exist_ok=True)
        save(learner, None, folder)
    else:
        restore(learner, source)
    drawn_steps(learner, range(2, 4))
    return {tensor: whole(p.detach()).clone() for tensor, p in model.named_parameters()}


def main(out: str, setups: Sequence[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    for strategy in dict.fromkeys(strategy for strategy, _ in setups):
        world = connect(ParallelConfig(strategy, timeout=300))
        for share in (share for its, share in setups if its == strategy):
            for name, case in CASES.items():
                found[strategy, share, name] = two_steps(case, world, share)
        if strategy == "fsdp" or world.size == 1:
            for name in WHOLE:
                saved = [Path(out).parent / f"{name}-{size}" for size in range(1, world.size + 1)]
                found["four steps", name] = four_steps(name, world, saved[-1])
                for size, folder in enumerate(saved[:-1], 1):
                    found["two steps", name, size] = four_steps(name, world, saved[-1], folder)
        if world.rank == 0:
            torch.save(found, out)
        world.close()


if __name__ == "__main__":
    main(sys.argv[1], [(strategy, share) for strategy, share in (word.split(",") for word in sys.argv[2:])])
