"""What a token weighs in the loss of a step: all tokens alike, all episodes alike, or by a constant."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np
import numpy.typing as npt

from llm_gym.errors import ConfigError, place
from llm_gym.harness.registry import as_numbers, by_name, want_shape
from llm_gym.harness.types import Floats

Counts = npt.NDArray[np.int64]
Normaliser = Callable[[Counts, int], Floats]
"""(trained tokens of each episode [E], constant length) -> weight of each of its tokens [E]."""


def token_global(counts: Counts, length: int) -> Floats:
    """1 / all trained tokens of the step: every token weighs the same (DAPO, https://arxiv.org/abs/2503.14476)."""
    return np.full(len(counts), 1.0 / max(1, counts.sum()))


def sequence(counts: Counts, length: int) -> Floats:
    """1 / (episodes * tokens of the episode): every episode weighs the same (GRPO, arXiv 2402.03300)."""
    return 1.0 / (max(1, len(counts)) * np.maximum(counts, 1))


def constant(counts: Counts, length: int) -> Floats:
    """1 / (episodes * constant length): no length bias (Dr. GRPO, https://arxiv.org/abs/2503.20783)."""
    return np.full(len(counts), 1.0 / (max(1, len(counts)) * length))


NORMALISERS: dict[str, Normaliser] = {"token_global": token_global, "sequence": sequence, "constant": constant}


def normaliser_of(name: str) -> Normaliser:
    """The function of that name in `NORMALISERS`, or the one at `package.module:function`.

    Raises:
        ConfigError: neither; or, when it is called, it gives something else than a weight for each episode.
    """
    fn: Normaliser = by_name("loss.normaliser", name, NORMALISERS)

    @wraps(fn)
    def checked(counts: Counts, length: int) -> Floats:
        words = "a weight of each episode [E]"
        weights = as_numbers("loss.normaliser", fn, fn(counts, length), words)
        want_shape("loss.normaliser", fn, weights, counts.shape, words)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ConfigError(f"loss.normaliser: {place(fn)} gave {weights!r:.80}, want finite weights, none below 0.")
        return weights

    return checked
