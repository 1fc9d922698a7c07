"""Train with a loss and an advantage of your own: two functions, named by where they are.

python examples/05_own_loss.py
"""

import tempfile

import numpy as np
import torch

from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.algorithms.losses import LossConfig, Metrics, token_level
from llm_gym.harness.algorithms.rewards import Floats, Rewards
from llm_gym.harness.algorithms.streams import Streams


@token_level  # each token on its own: loss and gradient in one pass over the logits, a quarter less work at the head
def asymmetric(s: Streams, config: LossConfig) -> tuple[torch.Tensor, Metrics]:
    """The policy gradient, but tokens of bad episodes count half: one value per trained token, [M]."""
    ratio = torch.exp(s.logprobs - s.old_logprobs)
    weight = torch.where(s.advantages < 0, 0.5, 1.0)
    return -weight * s.advantages * ratio.clamp(max=1 + config.clip_high), {"policy/ratio_mean": ratio.detach()}


def against_the_best(rewards: Rewards) -> Floats:
    """Every episode against the best of its group, [tasks, episodes]; NaN (it failed) becomes 0."""
    return np.nan_to_num(rewards.returns - np.nanmean(rewards.returns, axis=1, keepdims=True)).clip(-1, 0.5)


if __name__ == "__main__":
    config = load(
        TrainConfig,
        env="Arithmetic-v0",
        steps=8,
        advantage=f"{__name__}:against_the_best",
        sets=[f"loss.name={__name__}:asymmetric", "eval.episodes=64", "optimizer.warmup_steps=2"],
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = Trainer(config, out=folder).train()
    for row in rows[1:]:
        print(f"step {row['step']:2d}  reward {row['reward/mean']:.2f}  ratio {row['policy/ratio_mean']:.4f}")
