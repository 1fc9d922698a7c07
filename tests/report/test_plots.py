"""Which charts an evaluation gets: bands, pass@k, further environments, ends."""

from __future__ import annotations

import re
from pathlib import Path

from run_folders import run

from llm_gym import report
from llm_gym.harness.evaluation.evaluator import metrics
from llm_gym.report.plots import MOST_LINES, ending_plots, evaluation_plots, is_evaluation


def measured(mean: float, *, parts: int = 1, most: int = 1) -> dict:
    """A summary as `harness.evaluation.statistics` makes it."""
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "kind": "normal"}
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= most]
    return {
        "episodes": 10, "failed": 1, "stop_reasons": {"answered": 7, "token_limit": 2, "env_error": 1},
        "reward": interval, "rewards": {f"part{i}": mean for i in range(parts)},
        "pass": {str(k): interval for k in ks} if most > 1 else {},
    }  # fmt: skip


def row(mean: float) -> dict[str, float]:
    """The evaluation of a run on two environments."""
    found = {}
    for prefix in ("eval/", "eval/gsm8k/"):
        for word in ("greedy", "sampled"):
            found |= metrics(measured(mean, parts=2, most=128), prefix, word)
    return found


def test_every_metric_of_an_evaluation_is_known() -> None:
    assert all(is_evaluation(name) for name in row(0.5) if not name.endswith("/problems"))  # a count, no curve
    assert not any(
        is_evaluation(n) for n in ("eval/", "eval/other", "reward/mean", "eval/a/b/sampled_reward", "time/eval")
    )


def test_charts_of_several_environments() -> None:
    plots = {plot.title: plot.metrics for plot in evaluation_plots(row(0.5))}
    assert list(plots) == ["pass@k", "Reward in evaluation: gsm8k", "pass@k: gsm8k"]
    assert plots["Reward in evaluation: gsm8k"][0] == ("eval/gsm8k/greedy_reward", "greedy")
    shown = [name for name, _ in plots["pass@k"]]
    assert len(shown) == MOST_LINES
    assert (shown[0], shown[-1]) == ("eval/pass@1", "eval/pass@128")
    ends = {plot.title: [name for _, name in plot.metrics] for plot in ending_plots(row(0.5))}
    assert ends["Parts of the reward in evaluation: gsm8k"] == ["part0", "part1"]
    assert ends["Ends in evaluation"] == ["answered", "turn_limit", "token_limit", "time_limit", "bad_reply", "failed"]
    assert evaluation_plots(metrics(measured(0.5), "eval/", "sampled")) == []


def test_the_page_shows_intervals_as_bands(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", 2, evaluated=False)
    for step, mean in ((3, 0.4), (4, 0.8)):
        folder.log({"step": step, **row(mean)})
    html = report.write(tmp_path / "r").read_text("utf-8")
    bands = re.findall(r'<path class="band b(\d)" d="([^"]+)"', html)
    assert [number for number, _ in bands] == ["0", "1", "0", "1"], "greedy and sampled, on both environments"
    assert all(path.count("L") == 3 and path.endswith("Z") for _, path in bands)
    words = " ".join(html.split())
    assert "sampled reward, unseen problems (95%: 0.7 to 0.9)" in words
    assert "pass@k: gsm8k" in words
    assert "Ends in evaluation: gsm8k" in words
    assert ">time_limit" not in words.split("Health")[1].split("Configuration")[0], "an end that never came"
    assert "eval/" not in words.split("Health")[1].split("Configuration")[0], "no chart of a metric's plain name"
