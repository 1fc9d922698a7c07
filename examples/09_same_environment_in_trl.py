"""One environment of your own, trained by TRL's GRPOTrainer and by llm_gym's, on the same model and seeds.

python examples/09_same_environment_in_trl.py     # needs `pip install 'llm-gym[trl]'`; half a minute of one core
"""

import os
import re
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import llm_gym
from llm_gym.embedded import PATH
from llm_gym.export import trl_dataset, trl_reward, trl_rollout_func
from llm_gym.harness import TrainConfig, Trainer, load

STEPS, PROMPTS, GROUP, LR = 6, 8, 8, 1e-3


class Large(llm_gym.TextEnv):
    """A sum of which one part is missing: the larger the last number of the reply, up to 99, the better."""

    def open(self):
        return [{"role": "user", "content": f"What is {self.np_random.integers(10, 50)} + x?"}]

    def reply(self, text):
        numbers = re.findall(r"\d+", text)
        return llm_gym.Reply(reward=min(int(numbers[-1][:3]), 99) / 99 if numbers else 0.0, done=True)


llm_gym.register("me/Large-v0", entry_point=Large)


def by_trl(folder):
    config = GRPOConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        learning_rate=LR, lr_scheduler_type="constant", max_completion_length=32, use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(PATH),
        args=config,
        train_dataset=trl_dataset(range(1000)),
        reward_funcs=trl_reward,
        rollout_func=trl_rollout_func("me/Large-v0"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [log["reward"] for log in trainer.state.log_history if "reward" in log]


def by_llm_gym(folder):
    sets = [f"optimizer.lr={LR}", "optimizer.warmup_steps=0", "sampling.max_tokens=32", "eval.episodes=8"]
    sizes = {"steps": STEPS, "prompts_per_step": PROMPTS, "group_size": GROUP}
    rows = Trainer(load(TrainConfig, env="me/Large-v0", sets=sets, **sizes), out=folder).train()
    return [row["reward/mean"] for row in rows[1:]]


for name, train in (("TRL", by_trl), ("llm_gym", by_llm_gym)):
    with tempfile.TemporaryDirectory() as folder:
        print(f"{name:8} reward by step:", " ".join(f"{reward:.2f}" for reward in train(folder)))
