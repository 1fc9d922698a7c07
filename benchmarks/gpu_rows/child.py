"""A row's process: it imports, waits for its row, and tells every figure; a crash or hang of it costs that row only."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_rows.rows import Found, Row, Setting, Value

PRELOAD = ("torch", "transformers", "llm_gym.harness.loops.trainer")
"""What nearly every row imports."""
TAIL = 1500
"""Characters of the log that stand in the result of a row that failed."""
NOTICE = 2.0
"""Seconds before the limit at which a row writes where each of its threads is."""
STARTING = 300.0
"""Seconds for imports, which a limit does not count: they go on while the row before is run."""
LEAVING = 5.0
"""Seconds that the process of a finished row has to end by itself."""
Result = dict[str, Any]
"""`verdict` (`pass`, `fail` or `needs`), `seconds`, `date`, `figures` by name, and `wrong`: sentences."""


def preload(row: Row) -> Callable[[Setting, Found], None]:
    """The row's function; what nearly every row needs is imported. Touches no device."""
    for name in PRELOAD:
        importlib.import_module(name)
    module, _, function = row.run.partition(":")
    found: Callable[[Setting, Found], None] = getattr(importlib.import_module(module), function)
    return found


class Child:
    """A process for one row; it imports what that needs, and waits.

    Args:
        row: the row.
        method: `spawn`, or `fork`: quicker, from a process that has imported all of it; never where CUDA is used.
        log: file that takes what it writes.
    """

    def __init__(self, row: Row, method: str, log: Path) -> None:
        context: Any = multiprocessing.get_context(method)
        self.row, self.log = row, log
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(row, theirs, str(log), os.getpid()))
        self.process.start()
        theirs.close()

    def run(self, device: str, limit: float) -> Result:
        """Runs it, and ends the process and whatever it has started."""
        began = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="llmgym-gpu-"))
        result: Result = {"verdict": "fail", "date": date.today().isoformat(), "figures": {}, "wrong": []}
        start = self.log.stat().st_size if self.log.exists() else 0
        try:
            left = self._listen(Setting(device, folder), limit, result)
            if left > 0:
                self.pipe.send(None)  # it may leave
                self.process.join(min(left, LEAVING))
        finally:
            self.kill()
            shutil.rmtree(folder, ignore_errors=True)
        result["seconds"] = round(time.monotonic() - began, 1)
        if result["wrong"]:
            said = self.log.read_text("utf-8", "replace")[start:].splitlines()
            result["log"] = "\n".join(line for line in said if not line.startswith("Extension modules:"))[-TAIL:]
        return result

    def kill(self) -> None:
        """Ends it, and its process group, at once; may be called twice."""
        if self.pipe.closed:
            return
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may not have made its group yet
        self.process.join()
        self.pipe.close()

    def _listen(self, setting: Setting, limit: float, result: Result) -> float:
        """Seconds that are left when the row has come to its end; 0 if it has not."""
        try:
            if not self.pipe.poll(STARTING):
                result["wrong"].append(f"its imports took more than {STARTING:g} s")
                return 0.0
            self.pipe.recv()
            end = time.monotonic() + limit
            self.pipe.send((setting, limit))
            while self.pipe.poll(max(0.0, end - time.monotonic())):
                kind, *said = self.pipe.recv()
                if kind == "end":
                    result["wrong"] += said
                    result["verdict"] = "fail" if result["wrong"] else "pass"
                    return end - time.monotonic()
                name, value, wrong = said
                result["figures"][name] = value
                result["wrong"] += [wrong] if wrong else []
        except (EOFError, OSError):
            self.process.join(5)
            result["wrong"].append(f"the process ended ({_how(self.process.exitcode)})")
            return 0.0
        result["wrong"].append(f"no end after {limit:g} s")
        return 0.0


def _how(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _main(row: Row, pipe: Connection, log: str, parent: int) -> None:
    """Imports, waits for the word, and runs the row."""
    from llm_gym.policies.vllm_server.process import die_with

    os.setsid()
    die_with(parent)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    run = preload(row)
    pipe.send("ready")
    setting, limit = pipe.recv()
    print(f"\n== {row.name} on {setting.device}", flush=True)
    faulthandler.enable(sys.__stderr__)  # a crash says where it was; so does a hang:
    faulthandler.dump_traceback_later(max(0.1, limit - NOTICE), file=sys.__stderr__)

    def tell(figure: str, value: Value, wrong: str) -> None:
        print(f"{figure}: {value} {wrong}", flush=True)
        pipe.send(("figure", figure, value, wrong))

    try:
        run(setting, Found(tell))
        said: tuple[str, ...] = ()
    except Exception as error:
        traceback.print_exc()
        said = (f"{type(error).__name__}: {' '.join(str(error).split()):.300}",)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(("end", *said))
    faulthandler.cancel_dump_traceback_later()
    pipe.recv()
