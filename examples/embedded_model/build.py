"""Makes the embedded model: corpus, tokenizer, three phases of fine-tuning, export, evaluation.

    python examples/embedded_model/build.py --out DIR [--seed 0] [--scale 1.0]

`DIR` becomes what `llm_gym/embedded` ships, with the corpus and the run folder of each phase beside it.
README.md says why each number is what it is.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Mix, examples
from english import paragraph
from evaluate import evaluate
from tokenizer import VOCABULARY, save_tokenizer, train_tokenizer

from llm_gym import embedded
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.loops.sft import SFTConfig, sft
from llm_gym.harness.model.loading import export

TEMPLATE = (embedded.PATH / "chat_template.jinja").read_text()
MODEL = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Qwen3's architecture at 0.86 million parameters."""
GENERATION = {"do_sample": True, "temperature": 1.0, "eos_token_id": 2, "pad_token_id": 0}
CHATS_PER_STEP = 64


@dataclass(frozen=True)
class Phase:
    """One stretch of training: what is read, for how long, and how fast the weights move."""

    steps: int
    mix: Mix
    optimizer: OptimizerConfig


def muon(lr: float, muon_lr: float, warmup: int, floor: float) -> OptimizerConfig:
    """Muon on the hidden matrices (https://kellerjordan.github.io/posts/muon), AdamW on the rest, cosine decay."""
    return OptimizerConfig(
        name="muon",
        lr=lr,
        muon_lr=muon_lr,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=warmup,
        floor=floor,
    )


SOUND = Mix(additions=0.3, tools=0.45, call_rate=0.9)
FAULTY = Mix(additions=0.4, tools=0.45, call_rate=0.35, carry_rate=0.2, slip_rate=0.3)
PHASES = (
    Phase(300, SOUND, muon(2e-3, 0.02, warmup=30, floor=0.05)),
    Phase(150, FAULTY, muon(2e-3, 0.02, warmup=30, floor=0.5)),
    Phase(150, FAULTY, muon(5e-4, 0.004, warmup=5, floor=0.05)),
)


def build(out: Path, *, seed: int = 0, scale: float = 1.0) -> None:
    """Writes the model's folder.

    Args:
        out: a new folder.
        seed: decides the corpus, the initial weights and the order of the data.
        scale: multiplies the number of steps of each phase, and with it the corpus.
    """
    out.mkdir(parents=True)
    save_tokenizer(train_tokenizer(tokenizer_text()), TEMPLATE, out)
    model: Any = None
    for index, phase in enumerate(PHASES):
        config = settings(out, index, phase, seed=seed, steps=max(1, round(scale * phase.steps)))
        write_corpus(config, phase.mix, seed=1000 * seed + index)
        model = sft(config)
    export(model, out, dtype=torch.bfloat16)
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")


def settings(out: Path, index: int, phase: Phase, *, seed: int, steps: int) -> SFTConfig:
    """A phase as `llmgym sft` would be told it: it begins from random weights, or where the one before ended."""
    return SFTConfig(
        dataset=str(out / f"phase{index + 1}.jsonl"),
        init={} if index else MODEL,
        model=str(out / f"phase{index}" / "model") if index else None,
        tokenizer=str(out),
        out=str(out / f"phase{index + 1}"),
        steps=steps,
        examples_per_step=CHATS_PER_STEP,
        seed=seed,
        optimizer=phase.optimizer,
    )


def write_corpus(config: SFTConfig, mix: Mix, *, seed: int) -> None:
    """The chats of a phase, one a line; each is read once."""
    chats = examples(seed, config.steps * config.examples_per_step, mix)
    Path(str(config.dataset)).write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def tokenizer_text() -> Iterator[str]:
    """What the merges are learned from: rendered chats of the corpus's kind, then English. Always the same."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for chat in examples(0, 3000, Mix(additions=0.3, tools=0.6, call_rate=0.6)):
        rendered, _ = render_jinja_template([chat["messages"]], tools=chat.get("tools"), chat_template=TEMPLATE)
        yield rendered[0]
    rng = random.Random(0)
    for _ in range(2000):
        yield paragraph(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="corpus, initial weights, order of the data")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps")
    parser.add_argument("--problems", type=int, default=512, help="test problems of each kind in the evaluation")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are tiny: a second thread costs more than it computes
    build(args.out, seed=args.seed, scale=args.scale)
    report = {"build/cpu_seconds": round(time.process_time(), 1), **evaluate(args.out, count=args.problems)}
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
