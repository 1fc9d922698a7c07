"""Files by which weights reach servers: written once, kept until the next ones, so that a server can restart."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_gym.errors import ConfigError, ended

if TYPE_CHECKING:
    import torch


def new_folder(chosen: str | Path | None) -> Path:
    """A new folder for weights, under `chosen` or in shared memory; those of dead processes are removed there."""
    shared = Path("/dev/shm")
    parent = Path(chosen) if chosen else shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    if not chosen:
        for old in parent.glob("llm_gym-*-*"):
            number = old.name.split("-")[1]
            if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
                shutil.rmtree(old, ignore_errors=True)
    try:
        return Path(tempfile.mkdtemp(prefix=f"llm_gym-{os.getpid()}-", dir=parent))
    except OSError as error:
        raise ConfigError(f"folder: cannot write in {parent}: {ended(error)}") from error


def write(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file; tensors that share memory (tied ones) are written once each."""
    from safetensors.torch import save_file

    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors:
        held = tensor.detach().cpu().contiguous()
        found[name] = held.clone() if held.data_ptr() in seen else held
        seen.add(held.data_ptr())
    save_file(found, str(path))


def copy(folder: Path, to: Path) -> None:
    """The safetensors files of a folder; copies, for whoever wrote them may write or delete them again.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"load_folder: {folder} has no safetensors files.")
    for file in files:
        shutil.copyfile(file, to / file.name)
