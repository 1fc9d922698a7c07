"""`llmgym replay`: train on a run's saved episodes again, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_gym.cli.group import settings
from llm_gym.cli.nproc import as_rank, launch, nproc_option
from llm_gym.cli.options import sets_option

if TYPE_CHECKING:
    from llm_gym.harness.loops.replay import Replayed

MOST = 12
"""Differences shown of a step."""
DIFFERS = 1
"""Exit code."""


@click.command("replay", short_help="Train on a run's saved episodes again, and compare with what it recorded.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), required=True, help="The step to train again.")
@click.option("--from", "source", type=click.Path(path_type=Path), help="Checkpoint; default: the newest before it.")
@sets_option
@nproc_option
@click.option("--out", type=click.Path(path_type=Path), help="Write the trained model here.")
@click.pass_context
def command(
    ctx: click.Context, run: Path, step: int, source: Path | None, sets: tuple[str, ...], nproc: int, out: Path | None
) -> None:
    """Trains on the saved episodes of RUN alone, up to --step: no engine, no rollout.

    It begins at the newest checkpoint before the step, or at the untrained model, and replays what lies between. Each
    step's metrics are compared with the run's, and its weights where the run has a checkpoint, to the last bit. The
    exit code is 1 if anything differs. Episodes of `llmgym train --rollout-only` are trained, with nothing to compare.
    A run of several processes comes out the same with as many.
    """
    from llm_gym.harness.config import TrainConfig
    from llm_gym.harness.distributed.world import here
    from llm_gym.harness.loops.replay import make_folder, processes_of, replay, starting_point
    from llm_gym.harness.runs.run_folder import RunFolder
    from llm_gym.harness.settings import load

    with settings():
        start, checkpoint = starting_point(RunFolder(run), step, source)
        load(TrainConfig, RunFolder(run).config_of(step), sets)
        if out is not None:
            make_folder(out)
    rank, size = here()
    if nproc > size:
        return launch(nproc, verdict=DIFFERS)
    say = click.echo if rank == 0 else lambda text: None
    say(f"{run}, from {checkpoint or 'the untrained model'}: step {start + 1} to {step}")
    if (then := processes_of(RunFolder(run), step)) != size:
        say(f"The run had {then} processes, this has {size}: sums are rounded otherwise. For the same: --nproc {then}")
    same = True
    with as_rank(rank):
        for replayed in replay(run, step, source=source, sets=sets, out=out):
            say("\n".join(shown(replayed)))
            same = same and not replayed.differences
    if out is not None:
        say(f"Model: {out}")
    ctx.exit(DIFFERS if rank == 0 and not same else 0)


def shown(replayed: Replayed) -> list[str]:
    """A step's comparison as lines of text."""
    loss, norm = (replayed.learned[f"policy/{name}"] for name in ("loss", "grad_norm"))
    differing = sum(difference.name in replayed.learned for difference in replayed.differences)
    counts = (
        (differing, replayed.metrics, "metrics"),
        (len(replayed.differences) - differing, replayed.tensors, "tensors"),
    )
    compared = [(differ, total, name) for differ, total, name in counts if total]
    if not compared:
        verdict = "nothing recorded to compare with"
    elif replayed.differences:
        verdict = " and ".join(f"{differ} of {total} {name}" for differ, total, name in compared) + " differ"
    else:
        verdict = " and ".join(f"{total} {name}" for _, total, name in compared) + " are equal to the last bit"
    lines = [f"step {replayed.step}: {verdict} (loss {loss:.6g}, gradient norm {norm:.6g})"]
    lines += [f"  {difference.name}: {difference.said}" for difference in replayed.differences[:MOST]]
    hidden = len(replayed.differences) - MOST
    return [*lines, f"  and {hidden} more"] if hidden > 0 else lines
