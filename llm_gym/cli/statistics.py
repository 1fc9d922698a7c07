"""What a set of episodes says about a policy, with its uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_gym.core import Episode

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    >>> wilson(8, 10)
    (0.4901..., 0.9433...)
    """
    p, z2 = successes / trials, Z95 * Z95
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None, str]:
    """95% confidence interval of a mean, and its name: `wilson` for values of 0 and 1, else `normal`.

    A single value that is neither 0 nor 1 has no interval: both ends are None.
    """
    if set(values) <= {0.0, 1.0}:
        return *wilson(int(sum(values)), len(values)), "wilson"
    data = np.asarray(values, np.float64)
    if len(data) == 1:
        return None, None, "normal"
    half = Z95 * float(data.std(ddof=1)) / math.sqrt(len(data))
    return float(data.mean()) - half, float(data.mean()) + half, "normal"


def summary(episodes: Sequence[Episode], seconds: float) -> dict[str, Any]:
    """Mean reward with its interval, components, ends and tokens, ready for JSON.

    Episodes whose end is not the policy's doing (`StopReason.failed`) are counted, and nothing else.
    """
    played = [e for e in episodes if not e.stop_reason.failed]
    tokens = sum(e.tokens_generated for e in episodes)
    found: dict[str, Any] = {"episodes": len(episodes), "failed": len(episodes) - len(played)}
    if played:
        low, high, kind = mean_interval([e.reward for e in played])
        found["reward"] = {"mean": float(np.mean([e.reward for e in played])), "low": low, "high": high, "kind": kind}
        names = dict.fromkeys(name for e in played for name in e.rewards)
        found["rewards"] = {name: float(np.mean([e.rewards.get(name, 0.0) for e in played])) for name in names}
    found["stop_reasons"] = {str(k): n for k, n in Counter(e.stop_reason for e in episodes).most_common()}
    found["turns_mean"] = sum(len(e.turns) for e in episodes) / len(episodes)
    found["tokens"] = {"total": tokens, "mean": tokens / len(episodes), "per_second": tokens / seconds}
    errors = Counter(e.error for e in episodes if e.error)
    return found | {"seconds": seconds, "errors": dict(errors.most_common(3))}
