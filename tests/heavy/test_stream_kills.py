"""A run whose rollouts are ahead, killed with -9 at random moments: every task ends once, and every step replays."""

from __future__ import annotations

import multiprocessing
import random
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from llm_gym.core import Task
from llm_gym.harness.data.tasks import Tasks
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.runs.run_folder import RunFolder

pytestmark = pytest.mark.heavy

processes = multiprocessing.get_context("forkserver")
COUNT, BOUND = 4, 2


@pytest.fixture(scope="module", autouse=True)
def _preload() -> None:
    processes.set_forkserver_preload(["llm_gym.harness.loops.trainer", "llm_gym.envs.arithmetic"])


def train(out: Path, steps: int) -> None:
    from llm_gym.harness import TrainConfig, Trainer

    config = TrainConfig(
        steps=steps,
        prompts_per_step=COUNT,
        group_size=4,
        eval={"episodes": 8, "every": 8},
        checkpoint={"every": 2, "keep": 0},
        stream={"max_staleness": BOUND},
        filters={"spread": 0},
        oversample={"max_factor": 4},
    )
    Trainer(config, out=out, resume=True, observer=object()).train()


def start(out: Path, steps: int) -> BaseProcess:
    process = processes.Process(target=train, args=(out, steps))
    process.start()
    return process


def rows(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def numbered(count: int) -> list[Task]:
    """The first tasks of any run with this seed, by their numbers."""
    tasks, found = Tasks(0), list[Task]()
    for step in range(-(-count // COUNT)):
        tasks.begin(step)
        found += tasks.draw(tasks.slots(COUNT))
    return found[:count]


@pytest.mark.parametrize(("kills", "steps"), [(3, 12), pytest.param(20, 60, marks=pytest.mark.soak)])
def test_every_task_ends_once_and_every_step_replays(kills: int, steps: int, tmp_path: Path) -> None:
    out, moments = tmp_path / "run", random.Random(0)
    for number in range(kills):
        run = start(out, steps)
        wanted = 2 + number * (steps - 6) // kills
        while rows(out) < wanted and run.is_alive():
            run.join(timeout=0.005)
        run.join(timeout=moments.uniform(0, 0.15))
        assert run.is_alive(), "the run was over before it could be killed"
        run.kill()
        run.join()
    last = start(out, steps)
    last.join()
    assert last.exitcode == 0
    folder, ended = RunFolder(out), list[int]()
    for step in range(1, steps + 1):
        trained = folder.read_episodes(f"step_{step:06d}")
        name = f"dropped_{step:06d}"
        dropped = folder.read_episodes(name) if (out / "episodes" / f"{name}.jsonl").exists() else []
        assert {v <= step - 1 <= v + BOUND for e in trained for t in e.turns for v in t.completion.versions} <= {True}
        ended += [episode.seed for episode in [*trained, *dropped][::4]]
        (found,) = replay(out, step, source=_before(folder, step)) if step % 2 else [None]
        assert found is None or found.differences == ()
    assert len(ended) == folder.metrics()[-1]["stream/ended"]
    assert sorted(ended) == sorted(task.seed for task in numbered(len(ended)))


def _before(folder: RunFolder, step: int) -> Path | None:
    return next((c for c in reversed(folder.checkpoints()) if int(c.name[5:]) < step), None)
