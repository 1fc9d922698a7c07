"""`report.html`: everything about a run on one page that needs nothing from outside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from llm_gym.harness.runs.run_folder import put, write_atomically
from llm_gym.harness.runs.verdict import warnings
from llm_gym.harness.runs.words import duration, problems, short
from llm_gym.report import charts
from llm_gym.report.run import Run, Series, read, title
from llm_gym.report.timeline import PHASES, last_steps
from llm_gym.report.transcripts import Decode, along_the_way, compare


@dataclass(frozen=True, slots=True)
class Fact:
    """A number at the top of the page; `before` is empty for one that has no before."""

    label: str
    value: str
    before: str = ""
    up: bool | None = None


def write(folder: str | Path, *, decode: Decode | None = None) -> Path:
    """Writes `report.html` into a run folder, whatever of the run is there yet.

    Args:
        folder: the run folder.
        decode: token ids -> text; with it, episodes are shown token by token, shaded by probability.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: there is no such folder, nothing of a run is in it, or it cannot be written.
    """
    # Text that is no valid Unicode (half a character, say) must not cost the whole page.
    page = render(read(folder), decode).encode("utf-8", "replace").decode("utf-8")
    path = Path(folder) / "report.html"
    with put("report", path):
        write_atomically(path, page)
    return path


def render(run: Run, decode: Decode | None = None) -> str:
    """The page as text; all that comes from the run is escaped by the template."""
    return _template().render(
        run=run,
        title=run.path.resolve().name,
        env=_text(title(run.config)),
        model=_text(run.config.get("model")) or "the embedded model",
        facts=facts(run),
        warnings=warnings(run.rows),
        main=charts.main_charts(run),
        more=charts.more_charts(run),
        constants=charts.constants(run),
        timeline=last_steps(run),
        phases=PHASES,
        problems=problems(run.config),
        comparison=compare(run, decode),
        steps=along_the_way(run, decode),
        box=charts,
    )


def facts(run: Run) -> list[Fact]:
    """The numbers at the top: what was gained, and what it took."""
    found = []
    for label, name in (("greedy", "eval/greedy_reward"), ("sampled", "eval/sampled_reward")):
        if series := run.series(name):
            found.append(_change(f"{label} reward, {problems(run.config)}{_interval(run, name)}", series))
    if not found and (series := run.series("reward/mean")):
        found.append(_change("training reward, first and last step", series))
    found.append(Fact("steps", f"{run.last_step:,}"))
    if seconds := sum(run.series("time/step").values):
        found.append(Fact("wall time of the steps", duration(seconds)))
    if tokens := sum(run.series("tokens/generated").values):
        found.append(Fact("tokens sampled", short(tokens)))
    return found


def _interval(run: Run, name: str) -> str:
    """The last confidence interval of a metric, if it has one."""
    low, high = run.series(f"{name}_low"), run.series(f"{name}_high")
    return f" (95%: {short(low.values[-1])} to {short(high.values[-1])})" if low and high else ""


def _change(label: str, series: Series) -> Fact:
    """First and last value; a lone value has no before."""
    first, last = series.values[0], series.values[-1]
    if len(series.values) == 1:
        return Fact(label, short(last))
    return Fact(label, short(last), short(first), last > first if last != first else None)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("llm_gym.report", "")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("page.html")
