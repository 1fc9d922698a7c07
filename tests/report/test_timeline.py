"""The timeline of a run's last steps: groups that overlap lie in lanes of their own, and nothing is drawn outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from run_folders import run

from llm_gym import report
from llm_gym.report.run import read
from llm_gym.report.timeline import LANES, LEFT, RIGHT, STEPS, last_steps


def row(step: int, groups: list[tuple[int, float, float]]) -> dict[str, Any]:
    """A step of one second: it waits for half of it, and trains for a quarter."""
    at = 100.0 + step
    phases = {"rollout": [at, at + 0.5], "train": [at + 0.5, at + 0.75], "step": [at, at + 1.0]}
    return {"step": step, "phases": phases, "groups": groups}


def folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    run(tmp_path / "r")
    (tmp_path / "r" / "timeline.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    return tmp_path / "r"


def test_groups_that_overlap_lie_in_lanes_of_their_own(tmp_path: Path) -> None:
    made = last_steps(read(folder(tmp_path, [row(1, [(0, 101.0, 101.4), (1, 101.2, 101.9), (2, 101.5, 101.8)])])))
    assert made is not None
    first, second, third = (bar for bar in made.bars if bar.color == 0)
    assert first.y == third.y < second.y
    assert second.text == "task 1: 0.70 s"
    scale = (RIGHT - LEFT) / 1.0
    assert abs(second.x - (LEFT + 0.2 * scale)) < 0.1
    assert abs(second.width - 0.7 * scale) < 0.1
    assert [bar.color for bar in made.bars if bar.color] == [1, 2]


def test_only_the_last_steps_are_drawn_and_nothing_lies_outside(tmp_path: Path) -> None:
    rows = [row(step, [(step, 99.0, 100.5 + step)]) for step in range(1, 20)]
    made = last_steps(read(folder(tmp_path, rows)))
    assert made is not None
    assert [number for _, number in made.steps] == [str(step) for step in range(20 - STEPS, 20)]
    assert min(bar.x for bar in made.bars) == LEFT
    assert max(bar.x + bar.width for bar in made.bars) <= RIGHT + 1


def test_steps_of_another_process_have_another_clock(tmp_path: Path) -> None:
    """The run went on a day later, or on a machine that was started anew."""
    for apart in (-50.0, 86400.0):
        later = row(4, [(4, 104.0 + apart, 104.4 + apart)]) | {"since": 3}
        later["phases"] = {name: [at + apart for at in span] for name, span in later["phases"].items()}
        before = [row(step, [(step, 99.0 + step, 100.5 + step)]) | {"since": 0} for step in range(1, 4)]
        made = last_steps(read(folder(tmp_path / str(apart), [*before, later])))
        assert made is not None
        assert made.steps == [(LEFT, "4")]
        assert "1.0 s" in made.note


def test_groups_beyond_the_last_lane_are_counted(tmp_path: Path) -> None:
    many = [(number, 101.0, 101.5) for number in range(LANES + 3)]
    made = last_steps(read(folder(tmp_path, [row(1, many)])))
    assert made is not None
    assert "3 more groups are not drawn" in made.note
    assert sum(bar.color == 0 for bar in made.bars) == LANES


def test_the_page_shows_it_where_rollouts_were_ahead(tmp_path: Path) -> None:
    ahead = folder(tmp_path / "a", [row(1, [(0, 101.0, 101.4)])])
    assert "Rollouts and learning" in report.write(ahead).read_text("utf-8")
    waits = folder(tmp_path / "b", [row(1, [])])
    assert "Rollouts and learning" not in report.write(waits).read_text("utf-8")
