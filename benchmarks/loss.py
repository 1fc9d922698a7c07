"""Loss and backward of a GRPO update: llm_gym's learner against TRL's GRPOTrainer, same model, tokens and sizes.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--vocabulary 32768] [--blocks 5] [--even]
    OMP_NUM_THREADS=1 python benchmarks/loss.py --vocabulary 151936 --prompts 1 --group 4

A random Qwen3 of hidden size 384 and 8 layers (float32, tied head); `--prompts` of 96 tokens, `--group` completions of
each, of 32 to 128 tokens (`--even`: all of 128). TRL: `_compute_loss` (which includes its log-probabilities and
entropies, made in tiles) and `backward`, with its default loss, nothing else of its step. llm_gym:
`Learner.backward` of the same rows, packed, prompts shared, its default loss. Blocks alternate in one process, the
first warms up. Below that, the two heads alone on the same hidden states. Medians of CPU-seconds; memory is the
growth of the resident set at its peak.
"""

from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import torch
import transformers
from datasets import Dataset
from head import Memory, clock
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from llm_gym.embedded import PATH
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.heads import token_loss
from llm_gym.harness.model.loading import prepare
from llm_gym.harness.types import TrainSequence

Update = tuple[Callable[[], None], Callable[[], None]]
"""What is measured, and what clears its gradients after it."""
CPU = torch.device("cpu")
PROMPT, COMPLETION = 96, 128


def qwen3(vocabulary: int) -> Qwen3ForCausalLM:
    """The 30M model (at 32k) of the other benchmarks, the same weights each time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).float()


def rollout(vocabulary: int, prompts: int, group: int, even: bool) -> tuple[list[TrainSequence], np.ndarray]:
    """Random rows as an engine would have sampled them, and their advantages."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(prompts):
        prompt = rng.integers(0, vocabulary, PROMPT)
        for _ in range(group):
            length = COMPLETION if even else int(rng.integers(COMPLETION // 4, COMPLETION + 1))
            tokens = np.concatenate([prompt, rng.integers(0, vocabulary, length)]).astype(np.int32)
            known = {"old_logprobs": np.full(length, -np.log(vocabulary), np.float32)}
            rows.append(TrainSequence(tokens, np.arange(PROMPT, len(tokens)), known))
    return rows, rng.standard_normal(len(rows))


def trl_update(vocabulary: int, rows: list[TrainSequence], advantages: np.ndarray) -> Update:
    """Loss and backward of TRL's trainer on the rows."""
    from trl import GRPOConfig, GRPOTrainer

    count = len(rows)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=count,
        num_generations=count,
        max_completion_length=COMPLETION,
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=qwen3(vocabulary),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "0"}] * count),
        processing_class=AutoTokenizer.from_pretrained(PATH),
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    completions = torch.zeros(count, max(len(r.tokens) for r in rows) - PROMPT, dtype=torch.int64)
    mask = torch.zeros_like(completions)
    for i, row in enumerate(rows):
        length = len(row.tokens) - PROMPT
        completions[i, :length], mask[i, :length] = torch.from_numpy(row.tokens[PROMPT:]), 1
    prompts = torch.from_numpy(np.stack([r.tokens[:PROMPT] for r in rows])).long()
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.from_numpy(advantages).float(),
        "num_items_in_batch": mask.sum(),
    }

    def update() -> None:
        trainer.accelerator.backward(trainer._compute_loss(model, inputs))

    return update, model.zero_grad


def our_update(vocabulary: int, rows: list[TrainSequence], advantages: np.ndarray) -> Update:
    """Loss and backward of our learner on the rows."""
    learner = Learner(prepare(qwen3(vocabulary)))
    credited = [
        replace(row, streams={**row.streams, "advantages": np.full(len(row.trained), a)}, episode=i)
        for i, (row, a) in enumerate(zip(rows, advantages, strict=True))
    ]
    batch = pack(credited, max_tokens=16384, share=True)

    def update() -> None:
        for micro in batch.micro:
            learner.backward(micro, 1.0)

    return update, learner.model.zero_grad


def heads(vocabulary: int, tokens: int) -> dict[str, Update]:
    """Both heads on the same hidden states: log-probabilities, entropies, a policy gradient, backward."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE
    from trl.trainer.utils import _ChunkedLogProbFunction as Chunked

    hidden = torch.randn(tokens, 384).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, 384)).requires_grad_()
    targets, credit = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens) / tokens

    def forget() -> None:
        hidden.grad = weight.grad = None

    def theirs() -> None:
        logprobs, *_ = Chunked.apply(hidden, weight, None, targets, 1.0, TILE, None, 1.0, ("log_probs", "entropy"))
        (credit * logprobs).sum().backward()

    def per_token(rows: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        return credit[rows] * logprobs

    def ours() -> None:
        token_loss(hidden, weight, targets, per_token).backward()

    return {"TRL": (theirs, forget), "llm_gym": (ours, forget)}


def compare(title: str, updates: dict[str, Update], blocks: int) -> None:
    """Alternates the two and prints medians."""
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in updates}
    for block in range(blocks + 1):
        for name, (update, forget) in updates.items():
            memory, started = Memory(CPU), clock(CPU)
            update()
            result = (clock(CPU) - started, memory.peak())
            forget()
            if block:
                runs[name].append(result)
    seconds = {name: [r[0] for r in found] for name, found in runs.items()}
    peak = {name: statistics.median(r[1] for r in found) for name, found in runs.items()}
    print(title)
    for name, found in seconds.items():
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(f"  {name:8} {statistics.median(found):8.3f} CPU-s ({spread})  {peak[name] / 2**20:7.0f} MB")
    ratio = statistics.median(seconds["TRL"]) / statistics.median(seconds["llm_gym"])
    print(f"  TRL / llm_gym: {ratio:.2f}x the time; llm_gym / TRL: {peak['llm_gym'] / peak['TRL']:.2f}x the memory")


def main() -> None:
    """Prints two comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--even", action="store_true")
    parser.add_argument("--heads", action="store_true", help="the heads alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, advantages = rollout(args.vocabulary, args.prompts, args.group, args.even)
    tokens = sum(len(r.trained) for r in rows)
    if not args.heads:
        updates = {
            "TRL": trl_update(args.vocabulary, rows, advantages),
            "llm_gym": our_update(args.vocabulary, rows, advantages),
        }
        compare(f"loss and backward, vocabulary {args.vocabulary}, {tokens} trained tokens", updates, args.blocks)
        del updates
    compare(f"the heads alone, {tokens} tokens", heads(args.vocabulary, tokens), args.blocks)


if __name__ == "__main__":
    main()
