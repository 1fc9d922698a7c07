"""The command group: finds commands by name, and turns what went wrong into one sentence."""

from __future__ import annotations

import _thread
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

import click

from llm_gym.errors import LLMGymError, SettingError, unknown

COMMANDS = (
    "train", "eval", "sft", "distill", "run", "export", "replay", "serve", "serve-chat", "serve-env", "work",
    "envs", "config", "doctor", "view",
)  # fmt: skip
"""In the order of `--help`; each is `llm_gym.cli.<name>:command`, with _ for -."""

EXIT_SETTING, EXIT_INTERRUPTED = 2, 130


class OneSentence(click.ClickException):
    """An error shown as `Error: <one sentence>`, without a traceback."""

    exit_code = EXIT_SETTING

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the sentence, on one line whatever it was made of."""
        click.echo(f"Error: {' '.join(self.message.split())}", err=True)


class Commands(click.Group):
    """Imports a command's file when the command is asked for; files import torch only inside functions."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"llm_gym.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command is answered with the nearest one."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(unknown("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; LLMGYM_DEBUG=1 lets errors through with their traceback."""
        try:
            return super().invoke(ctx)
        except LLMGymError as error:
            if os.environ.get("LLMGYM_DEBUG"):
                raise
            raise OneSentence(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)


@contextmanager
def settings() -> Iterator[None]:
    """Wraps the part of a command that only reads settings: what fails there is a bad setting, not a bug.

    Raises:
        SettingError: in place of a `ValueError`, `OSError` or `ImportError`.
    """
    try:
        yield
    except LLMGymError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise SettingError(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llm-gym", message="llm-gym %(version)s")
def llmgym() -> None:
    """Gymnasium for language models: train, measure and look at policies in text environments.

    `llmgym train` alone trains the embedded model on a laptop's CPU in a few minutes.
    """


def interrupted_again(lost: sys.UnraisableHookArgs) -> None:
    """Where Ctrl-C came while an object was deleted, Python can only print it, and goes on: so it comes again.

    Every import deletes a lock in that way: one in a thousand moments of importing an engine.
    """
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.01, _thread.interrupt_main)  # not here, where it would be lost too
    again.daemon = True
    again.start()


def as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """What a signal does that ends a command as Ctrl-C does: engines, tools and temporary files end with it."""
    interrupt = signal.getsignal(signal.SIGINT)
    interrupt(signal.SIGINT, frame) if callable(interrupt) else signal.default_int_handler(number, frame)


def main() -> None:
    """The entry point of the `llmgym` command."""
    sys.unraisablehook = interrupted_again
    signal.signal(signal.SIGTERM, as_ctrl_c)
    for stream in (sys.stdout, sys.stderr):
        # Curves and models' text are Unicode; a terminal that is not must not end the run.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not os.environ.get("LLMGYM_DEBUG"):  # read when torch is imported: C++ stacks where a connection was lost
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.path.append(os.getcwd())  # environments and reward functions in this folder, as under `python -m`
    llmgym(prog_name="llmgym")
