"""`llmgym serve`: a vLLM server with the flags that training needs."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from llm_gym.cli.options import host_option, parse_args, port_option, token_option
from llm_gym.errors import PolicyError

if TYPE_CHECKING:
    from rich.console import Console

    from llm_gym.policies.vllm_server.process import ServerProcess

LINE = 10.0
"""Seconds between two lines about the start where no terminal shows a clock."""

EVERY_UPDATE = ("Attempted to load weight", "Failed to load weights")
"""What vLLM warns of each time: that a learner's float32 is rounded, tensor by tensor; that what it ties or computes
itself is not sent. Whether an update has arrived is proven by checksums."""


@click.command("serve", short_help="Start a vLLM server that training and eval can use.")
@click.option("--model", metavar="MODEL", help="Run folder, checkpoint, folder or hub id; default: the embedded model.")
@port_option(8000)
@host_option
@token_option
@click.option(
    "--set",
    "sets",
    metavar="KEY=VALUE",
    multiple=True,
    help="Argument of vLLM's server (max_model_len=4096, tensor_parallel_size=2 ...); may be repeated.",
)
@click.option("--verbose", is_flag=True, help="Show everything that the server writes.")
def command(model: str | None, port: int, host: str, token: str | None, sets: tuple[str, ...], verbose: bool) -> None:
    """Starts a vLLM server in this terminal, and ends it, with every process it started, at Ctrl-C.

    Unless --host says otherwise it listens on 127.0.0.1 only: whoever reaches it can load files into it. A trainer on
    another machine needs --host and --token there, and the same LLM_GYM_TOKEN where it runs; it uploads the weights.
    Nothing is encrypted: in a network that is not yours forward the port (`ssh -L 8000:127.0.0.1:8000 machine`).
    """
    from rich.console import Console

    from llm_gym.access import loopback, url_of
    from llm_gym.cli.group import settings
    from llm_gym.harness.model.loading import config_of
    from llm_gym.harness.runs.lineage import model_path
    from llm_gym.models.plain import plain_folder
    from llm_gym.policies.vllm_server.process import ServerProcess

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    up = False

    def echo(line: str) -> None:
        if verbose or (up and important(line)):
            click.echo(line, err=True)

    with settings():
        config_of(model_path(model))
    with settings(), signals(), plain_folder(model_path(model)) as path:
        arguments = parse_args(sets, "--set")
        server = ServerProcess(path, port=port, host=host, token=token, settings=arguments, echo=echo)
        try:
            _wait(server, console, f"starting vLLM on {model or 'the embedded model'}")
            up = True
            _tell(server.url if loopback(host) else url_of(named(host), server.port), model)
            server.join()
            raise PolicyError(f"the vLLM server ended: {server.last_error()}")
        finally:
            server.stop()


def _wait(server: ServerProcess, console: Console, what: str) -> None:
    """Waits for health, with a clock on a terminal and a line now and then elsewhere."""
    if console.is_terminal:
        with console.status(what) as status:
            server.wait(lambda seconds: status.update(f"{what}, {seconds:.0f} s"))
        return
    console.print(what)
    said = 0.0

    def on_wait(seconds: float) -> None:
        nonlocal said
        if seconds - said >= LINE:
            said = seconds
            console.print(f"{what}, {seconds:.0f} s")

    server.wait(on_wait)


def named(host: str) -> str:
    """What other machines call a host that listens there."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host


def _tell(url: str, model: str | None) -> None:
    by_name = f" --model {model}" if model else ""
    train = f"llmgym train --set policy.servers=[{url}]" + (f" --set model={model}" if model else "")
    click.echo(f"serving on {url}; Ctrl-C ends it")
    click.echo(f"  {train}")
    click.echo(f"  llmgym eval{by_name} --policy server --option servers={url}")
    sys.stdout.flush()


def important(line: str) -> bool:
    """Errors and warnings, without those of every update."""
    return (" ERROR " in line or " WARNING " in line) and not any(words in line for words in EVERY_UPDATE)


@contextmanager
def signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, so that what it started ends too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    names = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(name, interrupt) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)
