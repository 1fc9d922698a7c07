"""What a report draws: which metrics share a chart, and what it says above it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plot:
    """What to draw: title, explanation, and the metrics with the names of their curves."""

    title: str
    note: str
    metrics: tuple[tuple[str, str], ...]


def one(title: str, note: str, metric: str) -> Plot:
    """A chart of a single metric."""
    return Plot(title, note, ((metric, ""),))


MAIN = (
    Plot(
        "Reward in evaluation",
        "on the same problems each time",
        (("eval/greedy_reward", "greedy"), ("eval/sampled_reward", "sampled")),
    ),
    one("Training reward", "mean of the episodes of each step", "reward/mean"),
)
MORE = (
    one("Entropy", "nats per sampled token", "policy/entropy"),
    one("Gradient norm", "before clipping", "policy/grad_norm"),
    Plot(
        "Log-probability gap",
        "sampler against learner, same weights, nats",
        (("sampler/logprob_gap_mean", "mean"), ("sampler/logprob_gap_max", "max")),
    ),
    Plot(
        "Tokens per second",
        "while that phase runs",
        (("tokens_per_second/rollout", "rollout"), ("tokens_per_second/train", "train")),
    ),
    one("Episode length", "sampled tokens per episode", "episode/tokens_mean"),
    one("Turns", "completions per episode", "episode/turns_mean"),
    one("Truncated", "fraction of episodes that a limit ended", "episode/truncated_fraction"),
    one("Reward spread", "standard deviation over the episodes of a step", "reward/std"),
    one("No spread", "fraction of groups whose episodes all have the same return", "groups/zero_spread"),
    Plot(
        "Groups",
        "of each step; reused: played in the step before",
        (("groups/played", "played"), ("groups/trained", "trained"), ("groups/reused", "reused")),
    ),
    one("Loss", "its value means little in policy-gradient training", "policy/loss"),
    one("KL to the reference", "nats per token", "policy/kl"),
    one("Learning rate", "of each step", "policy/lr"),
    one("Failed", "fraction of episodes lost to errors, never trained on", "episode/failed_fraction"),
    one("Clipped", "fraction of tokens outside the trust region", "policy/clip_fraction"),
    Plot(
        "Staleness",
        "updates that the trained tokens were old",
        (("stream/staleness_mean", "mean"), ("stream/staleness_max", "max")),
    ),
    Plot(
        "Rollouts ahead",
        "groups that are whole and wait, and groups under way, after each step took its own",
        (("stream/buffer", "waiting"), ("stream/under_way", "under way")),
    ),
    one("Waited", "seconds that a step waited for groups", "stream/wait"),
    Plot(
        "Seconds per step",
        "by phase",
        (("time/rollout", "rollout"), ("time/train", "train"), ("time/sync", "sync")),
    ),
)
MOST_LINES = 6
"""Curves in one chart; a page has colours for so many."""
_EVALUATED = re.compile(
    r"eval/(?:(?P<env>[\w.-]+)/)?"
    r"(?P<kind>(?:greedy|sampled)_reward(?:_low|_high)?$|pass@|(?:greedy|sampled)_reward/|sampled_stop/)(?P<what>.*)"
)
"""The names of `harness.evaluation.evaluator.metrics`."""


def is_evaluation(metric: str) -> bool:
    """Whether `evaluation_plots` draws a metric, or leaves it to metrics.jsonl."""
    return _EVALUATED.fullmatch(metric) is not None


def evaluation_plots(metrics: Iterable[str]) -> list[Plot]:
    """Of each further environment the rewards, and of every environment pass@k."""
    found = _by_environment(metrics)
    plots = []
    for env, kinds in found.items():
        on, prefix = f": {env}" if env else "", f"eval/{env}/" if env else "eval/"
        if env:
            both = tuple((f"{prefix}{word}_reward", word) for word in ("greedy", "sampled"))
            plots.append(Plot(f"Reward in evaluation{on}", "on the same problems each time", both))
        if ks := _few(sorted(kinds.get("pass@", []), key=int)):
            note = "chance that one of k sampled completions passes"
            plots.append(Plot(f"pass@k{on}", note, tuple((f"{prefix}pass@{k}", f"k = {k}") for k in ks)))
    return plots


def ending_plots(metrics: Iterable[str]) -> list[Plot]:
    """How sampled evaluation episodes ended, and the parts of their reward, of every environment."""
    plots = []
    for env, kinds in _by_environment(metrics).items():
        on, prefix = f": {env}" if env else "", f"eval/{env}/" if env else "eval/"
        for kind, title, note in (
            ("sampled_reward/", "Parts of the reward in evaluation", "of sampled completions, unweighted"),
            ("sampled_stop/", "Ends in evaluation", "share of sampled episodes"),
        ):
            if parts := _few(kinds.get(kind, [])):
                plots.append(Plot(f"{title}{on}", note, tuple((f"{prefix}{kind}{part}", part) for part in parts)))
    return plots


def _by_environment(metrics: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Environment ("": the run's own) -> kind of metric -> what follows the kind."""
    found: dict[str, dict[str, list[str]]] = {}
    for match in filter(None, map(_EVALUATED.fullmatch, metrics)):
        found.setdefault(match["env"] or "", {}).setdefault(match["kind"], []).append(match["what"])
    return found


def _few(names: Sequence[str]) -> list[str]:
    """At most as many as a chart has lines: the ends, and an even choice between them."""
    if len(names) <= MOST_LINES:
        return list(names)
    return [names[round(i * (len(names) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]
