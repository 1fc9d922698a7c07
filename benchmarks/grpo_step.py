"""CPU-seconds of a GRPO step: llm_gym against TRL's GRPOTrainer, same model, prompts and sizes, in one process.

    OMP_NUM_THREADS=1 python benchmarks/grpo_step.py [--steps 6] [--blocks 5]

Both train the embedded model (float32) on two-digit addition, 16 prompts x 8 completions of at most 40 tokens,
T=1, one optimizer step per rollout, one micro-batch, no KL, no gradient checkpointing, no logging to disk, with
a learning rate so small that the completions stay alike. Blocks alternate; a block's first step (warm-up) is
left out; the table gives medians over the blocks of the mean CPU-seconds per step, and the spread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import statistics
import tempfile
import warnings

import torch
import transformers
from datasets import Dataset
from head import clock
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from llm_gym.embedded import PATH
from llm_gym.envs import make
from llm_gym.envs.grading import verify
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.settings import load

PROMPTS, GROUP, TOKENS, LR = 16, 8, 40, 1e-7


class StepClock(TrainerCallback):
    """The time at the end of every step of TRL's trainer."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.ends: list[float] = []
        self.lengths: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(clock(self.device))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])


def problems(count: int) -> Dataset:
    """Prompts of the environment that llm_gym trains on, with their answers."""
    env = make("Arithmetic-v0")
    rows = []
    for seed in range(count):
        _, info = env.reset(seed=seed)
        question = info["messages"][-1]["content"]
        a, b = (int(word.strip("?")) for word in question.split() if word.strip("?").isdigit())
        rows.append({"prompt": info["messages"], "answer": str(a + b)})
    return Dataset.from_list(rows)


def score(completions, answer, **kwargs) -> list[float]:
    """TRL's reward function: the same grader that the environment uses."""
    return [float(verify(gold, c[0]["content"]).score) for c, gold in zip(completions, answer, strict=True)]


def trl_block(steps: int, data: Dataset, model: str, device: str = "cpu") -> tuple[float, float]:
    """Seconds (of `head.clock`) per step and tokens per completion of a fresh GRPOTrainer."""
    from trl import GRPOConfig, GRPOTrainer

    watch = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            max_steps=steps,
            learning_rate=LR,
            beta=0.0,
            temperature=1.0,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            bf16=False,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=score,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return (watch.ends[-1] - watch.ends[0]) / (steps - 1), statistics.mean(watch.lengths)


class RowClock(Observer):
    """The time at every row of ours."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.ends: list[float] = []
        self.lengths: list[float] = []

    def on_row(self, row) -> None:
        self.ends.append(clock(self.device))
        self.lengths.append(row["tokens/generated"] / (PROMPTS * GROUP))


def our_block(steps: int, model: str, device: str = "cpu") -> tuple[float, float]:
    """Seconds (of `head.clock`) per step and tokens per completion of a fresh Trainer, run folder included."""
    watch = RowClock(device)
    with tempfile.TemporaryDirectory() as folder:
        config = load(
            TrainConfig,
            model=model,
            device=device,
            steps=steps,
            prompts_per_step=PROMPTS,
            group_size=GROUP,
            sets=[
                f"optimizer.lr={LR}",
                f"sampling.max_tokens={TOKENS}",
                "eval.episodes=0",
                f"checkpoint.every={steps}",
            ],
        )
        trainer = Trainer(config, out=folder, observer=watch)
        for _ in range(steps):
            trainer.train_step()
        trainer.close()
    return (watch.ends[-1] - watch.ends[0]) / (steps - 1), statistics.mean(watch.lengths)


def main() -> None:
    """Alternates the blocks and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--model", default=str(PATH))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    data = problems(PROMPTS * args.steps)
    results: dict[str, list[tuple[float, float]]] = {"TRL": [], "llm_gym": []}
    for _ in range(args.blocks):
        results["TRL"].append(trl_block(args.steps, data, args.model))
        results["llm_gym"].append(our_block(args.steps, args.model))
    print(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}, {args.blocks} alternating blocks of {args.steps} steps")
    print(f"{'':8} {'CPU-s/step':>10} {'min':>7} {'max':>7} {'tokens/completion':>18}")
    for name, blocks in results.items():
        cpu, length = [b[0] for b in blocks], statistics.mean(b[1] for b in blocks)
        print(f"{name:8} {statistics.median(cpu):10.3f} {min(cpu):7.3f} {max(cpu):7.3f} {length:18.1f}")
    ratio = statistics.median(b[0] for b in results["TRL"]) / statistics.median(b[0] for b in results["llm_gym"])
    print(f"TRL / llm_gym: {ratio:.2f}")


if __name__ == "__main__":
    main()
