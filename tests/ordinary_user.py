"""Run a command as an ordinary user, although the tests run as root and the interpreter may lie in root's home."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from llm_gym.envs.tools.sandbox.guest import syscalls

UID = 61_500
REPOSITORY = Path(__file__).parents[1].resolve()


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` as the user `UID`, without any capability; needs root that may make a mount namespace."""
    return subprocess.run(
        [sys.executable, __file__, *command],
        env={
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": "/tmp",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def closed(path: Path) -> Path | None:
    """The topmost folder above (or at) `path` that other users may not enter."""
    return next((p for p in reversed((path, *path.parents)) if not p.stat().st_mode & stat.S_IXOTH), None)


def open_up(paths: list[Path]) -> None:
    """In a mount namespace of this process, makes `paths` reachable for everybody (what lies beside them is hidden)."""
    syscalls.unshare(syscalls.NEWNS)
    syscalls.mount("none", "/", None, syscalls.REC | syscalls.PRIVATE)
    blocked = [(path, folder, os.open(path, os.O_PATH)) for path in paths if (folder := closed(path))]
    for folder in {folder for _, folder, _ in blocked}:
        syscalls.mount("tmpfs", str(folder), "tmpfs", 0, "mode=0755")
    for path, _, fd in blocked:
        path.mkdir(parents=True, exist_ok=True)
        syscalls.mount(f"/proc/self/fd/{fd}", str(path), None, syscalls.BIND | syscalls.REC)


if __name__ == "__main__":
    os.umask(0o022)
    open_up([Path(p).resolve() for p in dict.fromkeys((sys.base_prefix, sys.prefix, REPOSITORY))])
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    os.execvp(sys.argv[1], sys.argv[1:])
