"""Several processes of one command on this machine: started as by torchrun, ended together."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from llm_gym.cli.group import EXIT_INTERRUPTED, EXIT_SETTING, OneSentence, as_ctrl_c
from llm_gym.errors import LLMGymError

F = TypeVar("F", bound=Callable[..., Any])

PATIENCE = 10
"""Seconds that processes have to end when one of them has."""
OURS = "llmgym-"
"""How the name of a run begins whose processes `launch` has started."""
FAREWELL = "farewell"
"""File, beside that of a process's error, of what it says when it is told to end."""


nproc_option: Callable[[F], F] = click.option(
    "--nproc",
    type=click.IntRange(1),
    default=1,
    help="Processes that train together; on this machine, or with --cluster where Ray places them.",
)


def launch(nproc: int, *, verdict: int | None = None) -> None:
    """Runs the `llmgym` command under way as `nproc` ranks through torchrun's agent, to their end.

    Args:
        nproc: how many.
        verdict: an exit code by which the first of them answers, and which becomes this process's.

    Raises:
        OneSentence: names the rank that ended early; the others are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)  # it logs what is said here
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with tempfile.TemporaryDirectory(prefix=OURS) as words:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=f"{OURS}{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=PATIENCE,
            logs_specs=DefaultLogsSpecs(log_dir=words),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "llm_gym.cli", *sys.argv[1:])
        except SignalException:
            for file in Path(words).rglob(FAREWELL):
                click.echo(file.read_text("utf-8"), err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except ChildFailedError as failed:
            raise account(failed.failures, verdict) from None


def account(failures: Mapping[int, Any], verdict: int | None) -> Exception:
    """What to end with when ranks have failed: what the first of them left word of, or how it ended."""
    # Signals, which are negative, are the first cause; but SIGTERM, and SIGKILL when their time is over, is how the
    # agent stops the others.
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    began = min(failure.timestamp for failure in failures.values())
    late = {rank for rank, failure in failures.items() if failure.timestamp - began >= PATIENCE - 1}
    stopped = {r for r in codes if codes[r] == -signal.SIGTERM or (r in late and codes[r] == -signal.SIGKILL)}
    rank = min(codes, key=lambda r: (r in stopped, codes[r], failures[r].timestamp, r))
    code, failure = codes[rank], failures[rank]
    if os.path.isfile(failure.error_file):
        return OneSentence(failure.message)
    if code in (EXIT_SETTING, EXIT_INTERRUPTED, verdict):  # it has said why
        return click.exceptions.Exit(code)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
    return OneSentence(f"rank {rank} {how}; the other processes were stopped.")


@contextmanager
def as_rank(rank: int, farewell: Callable[[], str] | None = None) -> Iterator[None]:
    """SIGTERM lets a process clean up, as Ctrl-C does; of several that train together one speaks for all.

    Of several, `launch` ends the others by SIGTERM when one has failed, and passes on the SIGTERM that ends itself:
    which it is, it knows alone, so what is to be said then is left with it. SIGTERM is not an exception of its own:
    one that comes between two steps of an event loop, which knows of Ctrl-C only, leaves tasks behind that say so.
    Once it is on its way out, SIGTERM does nothing: an exit that is interrupted leaves threads in torch, and aborts.

    Args:
        rank: of this process.
        farewell: how to go on after Ctrl-C or SIGTERM, for rank 0 to say.

    Raises:
        Exit: after Ctrl-C or SIGTERM; and where `launch` speaks for an error.
    """
    ending: list[int] = []
    several = "RANK" in os.environ

    def end(number: int, frame: FrameType | None) -> None:
        ending.append(number)
        if len(ending) == 1:
            as_ctrl_c(number, frame)

    mine = threading.current_thread() is threading.main_thread()  # no other may ask for signals
    before = signal.signal(signal.SIGTERM, end) if mine else None
    try:
        with _one_speaks():
            yield
    except KeyboardInterrupt:
        if rank == 0 and farewell is not None:
            _part(farewell(), told=bool(ending))
        if ending and several:
            sys.exit(128 + signal.SIGTERM)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if several or ending else before)


@contextmanager
def _one_speaks() -> Iterator[None]:
    """An error that several processes have is said once: each leaves word of it, and who started them speaks."""
    try:
        yield
    except LLMGymError as error:
        if not _launched() or os.environ.get("LLMGYM_DEBUG"):
            raise
        word = json.dumps({"message": str(error), "timestamp": int(time.time())})
        _leave(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), word)  # where torchrun's agent looks for it
        raise click.exceptions.Exit(EXIT_SETTING) from None


def _part(farewell: str, *, told: bool) -> None:
    """Says how to go on, or leaves it with `launch` if this process was `told` to end by it."""
    if told and _launched():
        _leave(Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name(FAREWELL), farewell)
    else:
        click.echo(farewell, err=True)


def _launched() -> bool:
    """Whether `launch` has started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OURS)


def _leave(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    half = file.with_suffix(".half")
    half.write_text(text, "utf-8")
    half.replace(file)
