"""The global generators of a run, so that code which draws from them repeats itself too."""

from __future__ import annotations

import random

import numpy as np
import torch


def reseed(seed: int, step: int) -> None:
    """Seeds the global generators of Python, NumPy and torch (every device) from the run's seed and the step.

    Nothing of llm_gym draws from them once a model is made: tasks, environments and completions have streams of their
    own. An environment, a reward or a loss of a user's may. Seeding at every step makes what they draw a function of
    (seed, step), so that a resumed run needs no saved state. What threads draw at once stays unordered.
    """
    words = np.random.SeedSequence([seed, step, 1]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
