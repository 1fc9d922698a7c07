"""Importance corrections for a sampler that is not quite the learner.

An engine computes other log-probabilities than the learner: other kernels, lower precision, older weights. Three
policies take part: the `sampler` that drew the tokens, the `proximal` one (the learner at the start of the
update), and the current one. The learner's own ratio may be taken

- against the sampler (`none`): current / sampler. This IS the importance correction, and it is clipped. Exact
  inside the clip; where sampler and learner differ by more than the clip, tokens are dropped as if the policy had
  moved too far.
- against the proximal policy, times a weight for proximal / sampler: the decoupled objective of
  https://arxiv.org/abs/2110.00641. The clip then bounds only what the learner moved, the weight only what the
  engine got wrong. Their product is current / sampler: each factor counts once.

Clipping current / sampler AND weighting by proximal / sampler would count the mismatch twice; no setting here
does. With one update per rollout the proximal policy is the current one before its step, so no extra forward pass
is needed. If sampler and learner agree, every weight is exactly 1 and every setting is the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from llm_gym.harness.algorithms.streams import same_shape, sequence_sum
from llm_gym.harness.bounds import Within
from llm_gym.harness.registry import by_name, want_shape
from llm_gym.harness.settings import checked


@checked("loss.correction")
@dataclass(frozen=True, slots=True)
class CorrectionConfig:
    """How tokens are weighted for the mismatch between sampler and learner."""

    name: str = "none"
    """`none`, `tis`, `mis`, `icepop` (see `CORRECTIONS`), or `package.module:function`."""
    level: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's own (small spread, biased), or the product over its sequence (unbiased below the
    bound, large spread)."""
    low: Annotated[float, Within("[0, 1]")] = 0.5
    """Smallest ratio that `mis` keeps; `tis` does not read it. That of a perfect sampler is 1."""
    high: Annotated[float, Within("[1, inf]")] = 2.0
    """Largest ratio: `tis` cuts down to it, `mis` drops what is above (IcePop: 5)."""

    def __post_init__(self) -> None:
        by_name("loss.correction.name", self.name, {**CORRECTIONS, "none": None})


def truncate(ratio: Tensor, low: float, high: float) -> Tensor:
    """min(ratio, high): truncated importance sampling, https://fengyao.notion.site/off-policy-rl."""
    return ratio.clamp(max=high)


def mask(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where low <= ratio <= high, else 0: masked importance sampling.

    By token it is IcePop (https://arxiv.org/abs/2510.18855, section on IcePop; bounds 0.5 and 5). A masked token
    stays in the denominators: it contributes nothing, and no other token counts for more because of it.
    """
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


CORRECTIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"tis": truncate, "mis": mask, "icepop": mask}
"""(proximal / sampler [M], low, high) -> weight [M]."""


def importance_weights(
    proximal: Tensor, sampler: Tensor, sequence: Tensor, config: CorrectionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of the tokens' losses, [M], without gradient; exactly 1 where the two agree.

    Args:
        proximal: the learner's log-probabilities before the update, [M].
        sampler: the engine's, [M].
        sequence: index of each token's sequence, int64 [M].
        config: which weights; not `none`.

    Returns:
        The weights, and streams [M] to average: the weight, and 1 where a bound changed it.
    """
    same_shape(proximal, sampler, sequence)
    log_ratio = (proximal - sampler).detach()
    ratio = torch.exp(log_ratio if config.level == "token" else sequence_sum(log_ratio, sequence))
    correct = by_name("loss.correction.name", config.name, CORRECTIONS)
    weight: Tensor = correct(ratio, config.low, config.high)
    want_shape("loss.correction.name", correct, weight, ratio.shape, "a weight of each token [M]", Tensor)
    return weight, {"sampler/weight_mean": weight, "sampler/weight_cut_fraction": (weight != ratio).to(ratio.dtype)}
