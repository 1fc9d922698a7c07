"""What a set of episodes says about a policy, with its uncertainty.

Episodes of one task are alike, so that k of them say less than k episodes of k tasks: every interval here is
clustered by task (https://arxiv.org/abs/2411.00640).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_gym.core import Episode

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""
ROUNDING = 1e-6
"""How far below the mark a return still passes: weighted components do not sum exactly."""


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Both numbers need not be whole: `mean_interval` passes effective ones.

    >>> wilson(8, 10)
    (0.4901..., 0.9433...)
    """
    p, z2 = successes / trials, Z95 * Z95
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(
    values: Sequence[float], tasks: Sequence[int] | None = None
) -> tuple[float | None, float | None, str]:
    """95% confidence interval of a mean, and its name: `wilson` for values of 0 and 1, else `normal`.

    The variance is that between tasks: (T / (T - 1)) sum over T tasks (sum of their deviations)^2 / N^2. For values
    of 0 and 1, Wilson's interval has N divided by the design effect, which is how many times larger this variance is
    than that of N independent values (https://pmc.ncbi.nlm.nih.gov/articles/PMC6690503); it is taken to lie between
    1 and N / T, so that a policy that always or never succeeds counts as one trial a task.

    Args:
        values: N numbers, at least one.
        tasks: the task of each; None: each its own.

    Returns:
        low, high, kind; one task whose values are not all 0 or 1 has no interval: both ends are None.
    """
    data = np.asarray(values, np.float64)
    clusters = np.unique(np.arange(len(data)) if tasks is None else np.asarray(tasks), return_inverse=True)[1]
    mean, n, t = float(data.mean()), len(data), int(clusters.max()) + 1
    sums = np.bincount(clusters, weights=data - mean)
    variance = t / (t - 1) * float(np.square(sums).sum()) / n**2 if t > 1 else math.inf
    if set(values) <= {0.0, 1.0}:
        independent = mean * (1 - mean) / n
        effect = variance / independent if independent and t > 1 else math.inf
        trials = n / min(max(effect, 1.0), n / t)
        return *wilson(mean * trials, trials), "wilson"
    if t == 1:
        return None, None, "normal"
    half = Z95 * math.sqrt(variance)
    return mean - half, mean + half, "normal"


def pass_at(k: int, passed: Sequence[int], tried: Sequence[int]) -> npt.NDArray[np.float64]:
    """Unbiased estimate of each task's probability that one of k episodes passes: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1, in its product form. Tasks with fewer than k
    episodes say nothing and are left out.

    Args:
        k: episodes one may try.
        passed: c, how many of a task's episodes passed.
        tried: n, how many it has.

    >>> pass_at(2, [0, 1, 4], [4, 4, 4]).tolist()
    [0.0, 0.5, 1.0]
    """
    pairs = [(c, n) for c, n in zip(passed, tried, strict=True) if n >= k]
    misses = (math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 0.0 for c, n in pairs)
    return np.array([1.0 - miss for miss in misses], np.float64)


def ks(most: int) -> list[int]:
    """The k of pass@k that `most` episodes a task allow: powers of two, and `most` itself.

    >>> ks(1), ks(8), ks(12)
    ([1], [1, 2, 4, 8], [1, 2, 4, 8, 12])
    """
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def summary(episodes: Sequence[Episode], seconds: float, *, mark: float = 1.0) -> dict[str, Any]:
    """Mean reward with its interval, pass@k, components, ends and tokens, ready for JSON.

    Episodes whose end is not the policy's doing (`StopReason.failed`) are counted, and nothing else. The reset seed
    says which task an episode is of; pass@k is there for tasks of several episodes. Tasks that ask the same are one
    problem (`problems`), by which intervals are clustered.

    Args:
        episodes: at least one.
        seconds: what they took.
        mark: the return from which an episode passes.
    """
    played = [e for e in episodes if not e.stop_reason.failed]
    tokens = sum(e.tokens_generated for e in episodes)
    found: dict[str, Any] = {"episodes": len(episodes), "failed": len(episodes) - len(played)}
    if played:
        rewards, asked = [e.reward for e in played], problems(played)
        found["problems"] = len(set(asked))
        found["reward"] = {"mean": float(np.mean(rewards)), **_interval(rewards, asked)}
        names = dict.fromkeys(name for e in played for name in e.rewards)
        found["rewards"] = {name: float(np.mean([e.rewards.get(name, 0.0) for e in played])) for name in names}
        found |= _passes(played, Counter(e.seed for e in episodes).most_common(1)[0][1], mark)
    found["stop_reasons"] = {str(k): n for k, n in Counter(e.stop_reason for e in episodes).most_common()}
    found["turns_mean"] = sum(len(e.spans) for e in episodes) / len(episodes)
    found["tokens"] = {"total": tokens, "mean": tokens / len(episodes), "per_second": tokens / seconds}
    errors = Counter(e.error for e in episodes if e.error)
    return found | {"seconds": seconds, "errors": dict(errors.most_common(3))}


def problems(episodes: Sequence[Episode]) -> list[int]:
    """For each episode the number of its problem: one task in several guises of the seed is one problem.

    Where every episode is one reply to one question, the same question (the first prompt, token by token) is the same
    problem. A game may hide what its opening does not say, and one opening for all says nothing: there each seed is
    a problem of its own.
    """
    prompts = [e.turns[0].prompt.tobytes() for e in episodes if len(e.spans) == 1]
    asked: Sequence[bytes | int] = prompts
    if len(prompts) < len(episodes) or len(set(prompts)) == 1:
        asked = [e.seed for e in episodes]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(asked))}
    return [numbers[key] for key in asked]


def different(tasks: int, asked: int | None) -> str:
    """How many problems were played, in words: where some tasks asked the same, how many different ones.

    >>> different(8, 8), different(512, 378)
    ('8', '378 different')
    """
    return f"{tasks:,}" if asked is None or asked >= tasks else f"{asked:,} different"


def _passes(played: Sequence[Episode], most: int, mark: float) -> dict[str, Any]:
    """`pass@k` by k, each with its interval; nothing where a task has one episode."""
    if most < 2:
        return {}
    tried = Counter(e.seed for e in played)
    passed = Counter(e.seed for e in played if e.reward >= mark - ROUNDING)
    asked = dict(zip((e.seed for e in played), problems(played), strict=True))
    found = {}
    for k in ks(most):
        enough = [seed for seed, count in tried.items() if count >= k]
        if enough:
            values = pass_at(k, [passed[s] for s in enough], [tried[s] for s in enough]).tolist()
            found[str(k)] = {"mean": float(np.mean(values)), **_interval(values, [asked[s] for s in enough])}
    return {"pass": found}


def _interval(values: Sequence[float], tasks: Sequence[int] | None = None) -> Mapping[str, Any]:
    low, high, kind = mean_interval(values, tasks)
    return {"low": low, "high": high, "kind": kind}
