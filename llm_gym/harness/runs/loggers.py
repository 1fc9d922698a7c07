"""Where rows of metrics go besides metrics.jsonl: a table of loggers, each a function that opens one.

A logger is a convenience: one that cannot start is a bad setting, found before the model loads; one that fails later
is switched off with a note, and the run goes on. metrics.jsonl is written first, always.
"""

from __future__ import annotations

import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llm_gym.errors import FAULTS, ConfigError, described, unknown
from llm_gym.harness.registry import by_name
from llm_gym.harness.settings import checked


class Logger(Protocol):
    """Takes the rows of one run."""

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics: numbers (NaN where nobody can say) and words, and its `step`."""

    def close(self) -> None:
        """The run is over, or stopped."""


@checked("log")
@dataclass(frozen=True)
class LogConfig:
    """Where rows of metrics go besides metrics.jsonl."""

    to: tuple[str, ...] = ()
    """Rows of `loggers.LOGGERS` (`tensorboard`, `wandb`, `trackio`), or "package.module:function"."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Keyword arguments of each by its name, such as `{wandb: {project: sums, mode: offline}}`."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`; after a resume, later events of the killed run are hidden."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else None
        self.writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=purge, **options)

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes the row's numbers."""
        for name, value in finite(row).items():
            if not isinstance(value, str):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; its id is kept in the run folder, so that a resumed run goes on with it."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int, **options: Any) -> None:
        import wandb

        mark = run / "wandb_id"
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex[:8], "utf-8")
        named = {"project": "llm-gym", "name": run.resolve().name, "id": mark.read_text("utf-8"), "resume": "allow"}
        self.run = wandb.init(dir=str(run), config=dict(config), **{**named, **options})

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends the row."""
        self.run.log(finite(row), step=row["step"])

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


class Trackio:
    """A run of trackio, in its local database."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int, **options: Any) -> None:
        import trackio

        named = {"project": "llm-gym", "name": run.resolve().name, "resume": "allow" if step else "never"}
        self.run: Any = trackio.init(config=dict(config), **{**named, **options})

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes the row."""
        self.run.log(finite(row), step=row["step"])

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


LOGGERS: dict[str, Callable[..., Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
"""Name -> (run folder, the run's settings, steps already done, **options) -> logger; the name is the package's too."""


def check(config: LogConfig) -> None:
    """Looks at every logger's name and package, before a model is loaded.

    Raises:
        ConfigError: no such logger, or its package is not installed.
    """
    for name in config.options:
        if name not in config.to:
            raise ConfigError(unknown("log.options", name, config.to or ["nothing: log.to is empty"]))
    for i, name in enumerate(config.to):
        if name in config.to[:i]:
            raise ConfigError(f"log.to: got {name!r} twice; name each once.")
        by_name("log.to", name, LOGGERS)
        if name in LOGGERS and importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.to: {name!r} needs a package of that name; pip install 'llm-gym[{name}]'.")


class Loggers:
    """The loggers of a run; none until `start`.

    Args:
        tell: is told, in a line, of a logger that is switched off.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.open: dict[str, Logger] = {}

    def start(self, config: LogConfig, run: Path, settings: Mapping[str, Any], step: int) -> None:
        """Opens all of them, or none.

        Args:
            config: which; `check` has accepted it.
            run: the run folder.
            settings: the run's, as plain values.
            step: steps already done.

        Raises:
            ConfigError: one cannot start.
        """
        for name in config.to:
            try:
                start: Callable[..., Logger] = by_name("log.to", name, LOGGERS)
                self.open[name] = start(run, settings, step, **config.options.get(name, {}))
            except FAULTS as error:
                self.close()
                raise ConfigError(f"log.to: {name!r} cannot start ({described(error)}).") from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Passes a row on to each."""
        for name, logger in list(self.open.items()):
            try:
                logger.log(row)
            except FAULTS as error:
                del self.open[name]
                _close(logger)
                self.tell(
                    f"log.to: {name!r} failed and is switched off ({described(error)}); metrics.jsonl has every row."
                )

    def close(self) -> None:
        """Closes each."""
        while self.open:
            name, logger = self.open.popitem()
            if error := _close(logger):
                self.tell(f"log.to: {name!r} could not be closed ({described(error)}); metrics.jsonl has every row.")


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's words and finite numbers, without its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and (isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)))
    }


def _close(logger: Logger) -> BaseException | None:
    try:
        logger.close()
    except FAULTS as error:
        return error
    return None
