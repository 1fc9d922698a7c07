"""Several processes of one command on this machine: started as by torchrun, ended together."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from llm_gym.cli.group import EXIT_INTERRUPTED, EXIT_SETTING, OneSentence
from llm_gym.errors import LLMGymError

F = TypeVar("F", bound=Callable[..., Any])

PATIENCE = 10
"""Seconds that processes have to end when one of them has."""
DEFERENCE = 2.0
"""Seconds that a process waits for the first one to say what went wrong in both."""


nproc_option: Callable[[F], F] = click.option(
    "--nproc", type=click.IntRange(1), default=1, help="Processes on this machine that train together."
)


def launch(nproc: int, *, verdict: int | None = None) -> None:
    """Runs the `llmgym` command under way as `nproc` ranks through torchrun's agent, to their end.

    Args:
        nproc: how many.
        verdict: an exit code by which the first of them answers, and which becomes this process's.

    Raises:
        OneSentence: names the rank that ended early; the others are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)  # it logs what is said here
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"llmgym-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "llm_gym.cli", *sys.argv[1:])
    except SignalException:
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        # Signals, which are negative, are the first cause; but SIGTERM is how the agent stops the others.
        rank = min(codes, key=lambda rank: (codes[rank] == -signal.SIGTERM, codes[rank]))
        if codes[rank] in (EXIT_SETTING, EXIT_INTERRUPTED, verdict):  # it has said why
            raise click.exceptions.Exit(codes[rank]) from None
        how = (
            f"was killed by {signal.Signals(-code).name}" if (code := codes[rank]) < 0 else f"failed (exit code {code})"
        )
        raise OneSentence(f"rank {rank} {how}; the other processes were stopped.") from None


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """What a process that is not alone does differently: SIGTERM lets it clean up, and the first speaks for all.

    Once it is on its way out, SIGTERM does nothing: an exit that is interrupted leaves threads in torch, and aborts.
    An error that all processes have is said once: the others wait a moment, in which they are stopped.
    """
    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        if rank:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        raise
    except LLMGymError:
        if rank:
            time.sleep(DEFERENCE)
        raise
    finally:
        if "RANK" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
