"""Makes the embedded model: corpus, tokenizer, three phases of fine-tuning, export, evaluation.

    python examples/embedded_model/build.py --out DIR [--seed 0] [--scale 1.0]

`DIR` becomes what `llm_gym/embedded` ships, plus `corpus/*.jsonl` and `evaluation.json`. README.md says why each
number is what it is.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Example, Mix, examples
from english import paragraph
from evaluate import evaluate
from tokenizer import VOCABULARY, save_tokenizer, train_tokenizer

from llm_gym import embedded
from llm_gym.harness.learner import OptimizerConfig
from llm_gym.harness.model import export
from llm_gym.harness.sft import SFTConfig, sft

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


def build(out: Path, *, seed: int = 0, scale: float = 1.0, phases: Sequence[Phase] = PHASES) -> Any:
    """Writes the model's folder and returns the trained model (float32).

    Args:
        out: the folder; what is in it is overwritten.
        seed: decides the corpus, the initial weights and the order of the data.
        scale: multiplies the number of steps of each phase (and with it the corpus).
        phases: the stretches of training.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = [write_corpus(out / "corpus" / f"phase{i + 1}.jsonl", p, i, seed, scale) for i, p in enumerate(phases)]
    save_tokenizer(train_tokenizer(tokenizer_text()), TEMPLATE, out)
    model = None
    for i, (phase, chats) in enumerate(zip(phases, texts, strict=True)):
        config = SFTConfig(
            init={} if i else MODEL,
            tokenizer=str(out),
            steps=len(chats) // CHATS_PER_STEP,
            examples_per_step=CHATS_PER_STEP,
            seed=seed,
            optimizer=phase.optimizer,
        )
        model = sft(config, chats, model=model)
    export(model, out, dtype=torch.bfloat16)
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    return model


def write_corpus(path: Path, phase: Phase, index: int, seed: int, scale: float) -> list[Example]:
    """The chats of a phase, each read once; also on disk, one a line, as `llmgym sft --data` takes them."""
    steps = max(1, round(phase.steps * scale))
    chats = list(examples(1000 * seed + index, steps * CHATS_PER_STEP, phase.mix))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return chats


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
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are tiny: a second thread costs more than it computes
    build(args.out, seed=args.seed, scale=args.scale)
    report = {"build/cpu_seconds": round(time.process_time(), 1), **evaluate(args.out)}
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
