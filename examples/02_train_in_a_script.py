"""Train from Python: a configuration, a trainer, rows of metrics.

python examples/02_train_in_a_script.py
"""

import tempfile

from llm_gym.harness import TrainConfig, Trainer, load

config = load(
    TrainConfig,
    env="Arithmetic-v0",
    steps=8,
    sets=["eval.episodes=64", "optimizer.warmup_steps=2", "loss.clip_high=0.28"],
)

with tempfile.TemporaryDirectory() as folder:
    rows = Trainer(config, out=folder).train()

for row in rows[1:]:
    print(f"step {row['step']:2d}  reward {row['reward/mean']:.2f}  entropy {row['policy/entropy']:.2f}")
print(f"unseen problems, greedy: {rows[0]['eval/greedy_reward']:.2f} -> {rows[-1]['eval/greedy_reward']:.2f}")
