"""How much memory is free, and how much something takes: on a CUDA device, or of this process on Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llm_gym.errors import ShortOfMemory

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class Unknown(Exception):
    """This system does not say."""


def free(device: torch.device) -> int:
    """Bytes that may still be allocated.

    On CUDA: what no process has, and what torch has cached. On a CPU: the least of what the machine has available
    and what this container's limit (cgroup version 1 or 2) leaves.

    Raises:
        Unknown: the system does not say.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    available = _field(PROC / "meminfo", "MemAvailable") * 1024
    return min([available, *_limits()])


def _limits() -> Iterator[int]:
    """What each control group's limit leaves; file pages that can be dropped count as free."""
    for limit, used, stat, name in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most = int((CGROUP / limit).read_text())
            yield max(0, most - int((CGROUP / used).read_text()) + _field(CGROUP / stat, name))
        except (OSError, ValueError, Unknown):  # no such group, or `max`: no limit
            continue


def peak(device: torch.device, run: Callable[[], object]) -> int:
    """Bytes by which memory in use grows, at most, while `run` runs.

    Raises:
        Unknown: the system does not say.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    gc.collect()
    _trim()
    try:
        (PROC / "self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError as error:
        raise Unknown("this system does not measure what a step takes") from error
    before = _field(PROC / "self/status", "VmRSS")
    run()
    return max(0, _field(PROC / "self/status", "VmHWM") - before) * 1024


def _trim() -> None:
    """Gives memory that was freed back to the system: it would hide what is allocated next."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # no glibc
        return


def _field(file: Path, name: str) -> int:
    """The number behind a name in a file of names and numbers."""
    try:
        for line in file.read_text().splitlines():
            first, *rest = line.replace(":", " ").split()
            if first == name:
                return int(rest[0])
    except (OSError, ValueError, IndexError) as error:
        raise Unknown("this system does not say how much memory is free") from error
    raise Unknown("this system does not say how much memory is free")


@contextmanager
def all_or_nothing(model: torch.nn.Module) -> Iterator[None]:
    """Gradients are added up inside; if memory runs out meanwhile, they are thrown away.

    Raises:
        ShortOfMemory: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        model.zero_grad(set_to_none=True)
        raise ShortOfMemory(" ".join(str(error).split()).partition(". ")[0].rstrip(".")) from error


def _ran_out(error: BaseException) -> bool:
    """Whether an allocator said no: CUDA's, the CPU's (a plain RuntimeError), or Python's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
