from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import decode, episode, run

from llm_gym import report
from llm_gym.errors import CheckpointError
from llm_gym.harness.runs.words import problems
from llm_gym.report.charts import main_charts, more_charts
from llm_gym.report.run import read


class Page(HTMLParser):
    """A page's text and elements; fails on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def page(path: Path, **kwargs: object) -> Page:
    written = report.write(path, **kwargs)  # type: ignore[arg-type]
    assert written == path / "report.html"
    return Page(written.read_text("utf-8"))


def test_says_before_and_after(tmp_path: Path) -> None:
    run(tmp_path / "r")
    words = " ".join(page(tmp_path / "r").text.split())
    assert "0.25 → 0.875 greedy reward" in re.sub(r"\s*→\s*", " → ", words).replace("0.875greedy", "0.875 greedy")
    assert "11 better, 0 worse, 1 unchanged" in words
    assert "before 3" in words
    assert "after 3" in words
    assert "before 10" not in words, "only the first ten pairs are shown"
    assert "3k" in words, "tokens sampled"
    assert "6 s" in words, "wall time"


def test_needs_nothing_from_outside(tmp_path: Path) -> None:
    run(tmp_path / "r")
    found = page(tmp_path / "r", decode=decode)
    assert not found.find("script")
    assert not found.find("link")
    assert not found.find("img")
    html = (tmp_path / "r" / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(", html)


@pytest.mark.parametrize("tokenised", [False, True])
def test_hostile_text_stays_text(tmp_path: Path, tokenised: bool) -> None:
    hostile = '</div><script>alert(1)</script><img src=x onerror="alert(2)">&amp;]]>\ud800'
    folder = run(tmp_path / "r")
    bad = episode(
        0,
        hostile.replace("\ud800", ""),
        1.0,
        question="</title><script>",
        messages=(
            {"role": "user", "content": hostile},
            {"role": '"><script>', "content": [{"type": "text", "text": hostile}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "</pre><script>"}}]},
        ),
        rewards={"<script>": 0.5, "b": 0.5},
        error=hostile,
    )
    for name in ("step_000003", "eval_000000", "eval_000003"):
        folder.write_episodes(name, [bad])
    folder.log({"step": 4, "reward/<script>": 0.1, "<script>": 1.0})
    folder.log({"step": 5, "reward/<script>": 0.2, "<script>": 2.0})
    found = page(tmp_path / "r", decode=decode if tokenised else None)
    assert not found.find("script")
    assert not found.find("img")
    assert "<script>alert(1)</script>" in found.text


def test_tokens_are_told_apart(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", 1)
    folder.write_episodes("step_000001", [episode(1, "call é", 1.0, tool="[result]")])
    html = report.write(tmp_path / "r", decode=decode).read_text("utf-8")
    assert '<span class="prompt">1+1?</span>' in html
    assert '<span class="environment">[result]</span>' in html
    assert '<span class="p1" title="p = 0.607">c</span>' in html
    assert '<span class="p2" title="p = 0.368">é</span>' in html, "two byte tokens make one character, p multiplies"
    assert '<span class="p3" title="p = 0.0498">d</span>' in html


METRICS = {
    "empty": "",
    "cut by a kill": '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "rew',
    "not finite": '{"step": 1, "reward/mean": NaN, "x": Infinity, "y": null}\n',
    "a gap": '{"step": 1, "a": 1}\n{"step": 2, "a": NaN}\n{"step": 3, "a": 2}\n',
    "no rows": '[1]\n3\n"x"\n{"step": null, "a": true, "b": "c"}\n',
    "huge and tiny": '{"step": 1, "a": 1e300, "b": 1e-300}\n{"step": 2, "a": -1e300, "b": 0}\n',
    "one step": '{"step": 1, "reward/mean": 0.5}\n',
}


@pytest.mark.parametrize("text", METRICS.values(), ids=METRICS)
def test_any_metrics(tmp_path: Path, text: str) -> None:
    run(tmp_path / "r", 1, evaluated=False)
    (tmp_path / "r" / "metrics.jsonl").write_text(text)
    html = report.write(tmp_path / "r").read_text("utf-8")
    Page(html)
    assert not re.search(r"\b(nan|inf|infinity)\b", html.lower())


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "episodes/step_000001.jsonl"])
def test_any_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    run(tmp_path / "r", 1, evaluated=False)
    (tmp_path / "r" / missing).unlink()
    page(tmp_path / "r")


@pytest.mark.parametrize(
    ("file", "text"), [("config.yaml", "a: ["), ("episodes/step_000001.jsonl", '\n{"trajectories"')]
)
def test_any_file_may_be_broken(tmp_path: Path, file: str, text: str) -> None:
    run(tmp_path / "r", 1, evaluated=False)
    (tmp_path / "r" / file).write_text(text)
    page(tmp_path / "r")


def test_one_evaluation_has_no_before(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", 1, evaluated=False)
    folder.log({"step": 2, "eval/greedy_reward": 0.5})
    folder.write_episodes("eval_000002", [episode(0, "only", 1.0)])
    text = page(tmp_path / "r").text
    assert "greedy reward" in text
    assert "Before and after" not in text


def test_long_run_stays_small(tmp_path: Path) -> None:
    run(tmp_path / "r", 1, evaluated=False)
    rows = "".join(f'{{"step": {s}, "a": {s % 7}, "b": {s % 11}, "c": {s}}}\n' for s in range(20_000))
    (tmp_path / "r" / "metrics.jsonl").write_text(rows)
    assert report.write(tmp_path / "r").stat().st_size < 500_000


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        report.write(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        report.write(tmp_path / "missing")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"env": "Arithmetic-v0"}, "unseen"),
        ({"env": "GSM8K-v0"}, "unseen"),
        ({"env": "GSM8K-v0", "env_args": {"dataset": "openai/gsm8k"}}, "unseen"),
        ({"env": "GSM8K-v0", "env_args": {"dataset": "a/train.jsonl"}}, "training"),
        ({"env": "GSM8K-v0", "env_args": {"dataset": "sample"}, "eval": {"env_args": {}}}, "training"),
        ({"env": "GSM8K-v0", "env_args": {"dataset": "a.csv"}, "eval": {"env_args": {"dataset": "b.csv"}}}, "unseen"),
        ({"env": "GSM8K-v0", "env_args": {"dataset": "a.csv"}, "eval": {"env_args": {"split": "x[90%:]"}}}, "unseen"),
        ({"env": "llm_gym/Dataset-v0", "env_args": {"dataset": "me/data"}}, "training"),
        ({"env": "Arithmetic-v0", "envs": [{"env": "GSM8K-v0", "env_args": {"dataset": "a.jsonl"}}]}, "training"),
        ({}, "problems of unseen seeds"),
    ],
)
def test_training_problems_are_not_called_unseen(config: dict[str, Any], words: str) -> None:
    assert problems(config) in (words, f"{words} problems")


def test_a_mixture_has_its_rewards_in_one_chart(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    for step in (4, 5):
        means = {f"reward/mean/{name}": step / 10 for name in ("A-v0", "test/B-v0")}
        folder.log({"step": step, "reward/style": step / 9, **means, "groups/played": step, "groups/trained": step / 2})
    charts = {chart.title: chart for chart in more_charts(read(tmp_path / "r"))}
    assert [line.name for line in charts["Training reward by environment"].lines] == ["A-v0", "test/B-v0"]
    assert [line.name for line in charts["Groups"].lines] == ["played", "trained"]
    assert not any("mean/" in title for title in charts)


def test_the_parts_of_the_reward_stand_with_the_rewards(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", 1)
    for step in range(2, 5):
        folder.log({"step": step, "reward/correct": step / 9, "reward/tool_calls": 1 / step, "reward/format": 0.0})
    found = read(tmp_path / "r")
    (chart,) = [chart for chart in main_charts(found) if chart.title == "Parts of the reward"]
    assert {"correct", "tool_calls"} <= {line.name for line in chart.lines}
    assert "format" not in {line.name for line in chart.lines}, "it never changed"
    assert not any("tool_calls" in chart.title for chart in more_charts(found))


def test_what_never_changes_needs_no_chart(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", 1, evaluated=False)
    for step in range(2, 5):
        folder.log({"step": step, "policy/ratio_mean": 1 + 1e-8 * step, "sampler/staleness_max": 0, "wave": step})
    words = " ".join(page(tmp_path / "r").text.split())
    assert "Constant throughout: policy/ratio_mean 1, sampler/staleness_max 0." in words
