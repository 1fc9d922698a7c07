"""A reward hacker's view: nothing that runs inside obtains what the trainer knows."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from sandbox_tiers import BACKENDS, TIERS

import llm_gym
from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import PythonSession

SECRET = "gold-" + "4815162342"

ATTACKS = r"""
import ctypes, glob, os, signal, socket, subprocess, sys
secret, found = "gold-" + "4815" + "162342", []
def attempt(name, action):
    try:
        value = action()
    except BaseException as error:
        return
    text = value if isinstance(value, bytes) else repr(value).encode()
    if secret.encode() in text: found.append(name)
def read(path, most=1 << 22):
    with open(path, "rb") as file: return file.read(most)
def memory(pid):
    for line in read(f"/proc/{pid}/maps").decode().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if "rw" in line and end - start < 1 << 28:
            try:
                with open(f"/proc/{pid}/mem", "rb") as file:
                    file.seek(start)
                    if secret.encode() in file.read(end - start): return secret
            except OSError: continue  # a device's
libc = ctypes.CDLL(None, use_errno=True)
def ptrace(pid):
    if libc.ptrace(16, pid, None, None) < 0: raise OSError
    return secret
pids = [p for p in os.listdir("/proc") if p.isdigit()] + [str(TRAINER)]
if CONTROL: pids = []  # reading the pipes of the trainer would block
attempt("memory of the trainer", lambda: memory(TRAINER))
me = str(os.getpid())
for pid in pids:
    if pid == me: continue
    for name in ("environ", "cmdline", "fd", "status", "maps", "auxv"):
        attempt(f"{name} of {pid}", lambda: read(f"/proc/{pid}/{name}"))
    attempt(f"memory of {pid}", lambda: memory(pid))
    attempt(f"ptrace of {pid}", lambda: ptrace(int(pid)))
    attempt(f"root of {pid}", lambda: read(f"/proc/{pid}/root{DATA!s}"))
    attempt(f"cwd of {pid}", lambda: os.listdir(f"/proc/{pid}/cwd") and read(f"/proc/{pid}/root{DATA!s}"))
    for fd in range(64):
        attempt(f"descriptor {fd} of {pid}", lambda: read(f"/proc/{pid}/fd/{fd}", 1 << 16))
attempt("environment", lambda: dict(os.environ))
attempt("data set", lambda: read(DATA))
attempt("data set by cat", lambda: subprocess.run(["cat", DATA], capture_output=True).stdout)
attempt("link", lambda: (os.symlink(DATA, "l"), read("l"))[1])
attempt("hard link", lambda: (os.link(DATA, "h"), read("h"))[1])
attempt("abstract socket", lambda: (s := socket.socket(socket.AF_UNIX), s.connect(f"\0{ABSTRACT}"), s.recv(99))[2])
attempt("socket file", lambda: (s := socket.socket(socket.AF_UNIX), s.connect(SOCKET), s.recv(99))[2])
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", PORT), 2).recv(99))
attempt("package", lambda: b"".join(read(p) for p in glob.glob(PACKAGE + "/**/*.jsonl", recursive=True)))
import gc
others = [o for o in gc.get_objects() if isinstance(o, dict) and o is not globals()]
attempt("objects", lambda: [x for o in others for x in o.values() if x == secret])
for pid in set() if CONTROL else {TRAINER, os.getppid() or 1, 1}:  # the parent may be outside: 0
    try: os.kill(pid, signal.SIGTERM)
    except OSError: pass
try: os.listdir(PACKAGE + "/envs/data") and found.append("package listing") if FULL else None
except OSError: pass
print("FOUND", found, os.getuid() != 0 or "ROOT")
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tier", [*TIERS, "none"])
def test_nothing_that_runs_inside_obtains_the_answer(
    tier: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLD_ANSWER", SECRET)
    held = mmap.mmap(-1, 4096)  # apart from the heap, which may be too large to be read
    held.write(SECRET.encode())
    data = tmp_path / "answers.jsonl"
    data.write_text(SECRET)
    tmp_path.chmod(0o755)
    servers = [socket.create_server(("127.0.0.1", 0))]
    for address in (f"\0gold{os.getpid()}", str(tmp_path / "s")):
        servers.append(socket.socket(socket.AF_UNIX))
        servers[-1].bind(address)
        servers[-1].listen(16)

    def serve(server: socket.socket) -> None:
        try:
            while True:
                client = server.accept()[0]
                client.sendall(SECRET.encode())
                client.close()
        except OSError:
            pass

    threads = [threading.Thread(target=serve, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    facts = {
        "TRAINER": os.getpid(),
        "DATA": str(data),
        "ABSTRACT": f"gold{os.getpid()}",
        "SOCKET": str(tmp_path / "s"),
        "PORT": servers[0].getsockname()[1],
        "PACKAGE": str(Path(llm_gym.__file__).parent),
        "CONTROL": tier == "none",
        "FULL": sandbox.tier(tier).isolation == "full",
    }
    with PythonSession(backend, tier) as sibling, PythonSession(backend, tier) as session:
        sibling.run("answer = 'gold-' + '4815162342'")
        session.run("; ".join(f"{name} = {value!r}" for name, value in facts.items()))
        result = session.run(ATTACKS, timeout=120)
        if tier == "none":  # the attacks are real: without a sandbox they succeed
            assert "data set" in result.output
            assert "tcp" in result.output
            assert "memory of the trainer" in result.output or os.geteuid()
            assert "abstract socket" in result.output
        else:
            assert result.output == "FOUND [] True\n", result
        assert sibling.run("answer").output == f"'{SECRET}'\n"
        assert session.run("1").output == "1\n"
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    for thread in threads:  # whose accept() holds the address
        thread.join()
    held.close()


READ_ALL = """
import os
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("cmdline", "comm", "stat", "status", "wchan", "maps", "environ", "task"):
        try:
            if name == "task": os.listdir(f"/proc/{pid}/task")
            found.append(open(f"/proc/{pid}/{name}").read())
        except OSError: pass
print([text for text in found if SECRET in text], len(found) > 0)
"""


@pytest.mark.parametrize("tier", [*TIERS, "none"])
def test_command_lines_of_other_processes_are_not_seen(tier: str) -> None:
    """Often a key or a path stands in one."""
    other = subprocess.Popen(["sh", "-c", f"read line # {SECRET}"], stdin=subprocess.PIPE)
    try:
        with PythonSession("worker", tier) as session:
            session.run(f"SECRET = {SECRET[:7]!r} + {SECRET[7:]!r}")
            output = session.run(READ_ALL).output
    finally:
        other.communicate()
    assert output == "[] True\n" if tier != "none" else SECRET in output
