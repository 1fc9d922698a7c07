"""What one session may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llm_gym.errors import SettingError


@dataclass(frozen=True)
class Limits:
    """Bounds of one session; each process of it has its own share of memory, CPU and descriptors."""

    memory: int = 4 << 30
    """Bytes of address space of each process."""
    cpu: int = 600
    """Seconds of processor time of each process; then it is killed."""
    processes: int = 64
    """Processes and threads at a time."""
    disk: int = 64 << 20
    """Bytes in the scratch folder (with a tmpfs for each session), and of any one file."""
    descriptors: int = 256
    """Open files of each process."""
    output: int = 16_384
    """Characters of a cell's output that are kept: its head and its tail."""
    code: int = 1 << 20
    """Bytes of a cell's code; a longer cell is refused."""
    grace: float = 1.0
    """Seconds between the interrupt of a late cell and the end of its session."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise SettingError(f"limits.{field.name}: {value!r} is not above 0.")
        if self.output < 100:
            raise SettingError(f"limits.output: {self.output} characters are too few; at least 100.")

    def resources(self) -> dict[str, int]:
        """The limits that setrlimit knows, by its names."""
        return {
            "AS": self.memory,
            "CPU": self.cpu,
            "NPROC": self.processes,
            "FSIZE": self.disk,
            "NOFILE": self.descriptors,
            "CORE": 0,
        }
