"""SFT, then GRPO, then export: `llmgym eval` and plain transformers on the exported folder say what training said."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "embedded_model"))
from corpus import Mix, examples

import llm_gym  # noqa: F401  registers the environments
from llm_gym.cli.group import llmgym
from llm_gym.episode_files import decode
from llm_gym.harness.evaluation.evaluator import EVAL_SEED

pytestmark = pytest.mark.heavy
EPISODES = 256
TUNE = {"sft": {"dataset": "chats.jsonl", "steps": 20, "examples_per_step": 32, "optimizer": {"lr": 1e-4}}}
TRAIN = {"env": "Arithmetic-v0", "steps": 12, "eval": {"episodes": EPISODES}}
LORA = {
    "lora": {"lora": {"rank": 8, "base": "float32"}, "optimizer": {"lr": 2e-3}},
    "qlora": {"lora": {"rank": 8, "base": "nf4"}, "optimizer": {"lr": 2e-3}},
}


def said(*words: str) -> str:
    done = CliRunner().invoke(llmgym, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def run(folder: Path, plan: dict[str, Any]) -> Path:
    """Runs a plan there and exports it to `folder / "out"`; the folder."""
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    said("run", str(folder / "plan.yaml"), "--out", str(folder / "run"))
    said("export", str(folder / "run"), str(folder / "out"))
    return folder


def trained(folder: Path) -> Path:
    """The run of GRPO, the last stage."""
    (found,) = (folder / "run").glob("*-train")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned and trained."""
    folder: Path = tmp_path_factory.mktemp("whole")
    chats = examples(7, 20 * 32, Mix(additions=1.0, tools=0.0, call_rate=0.0))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tune = {"sft": TUNE["sft"] | {"dataset": str(folder / "chats.jsonl")}}
    return run(folder, {"stages": [tune, {"train": TRAIN}]})


@pytest.fixture(
    scope="module", params=["whole", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("lora", "qlora"))]
)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> tuple[Path, dict[str, Any]]:
    """The exported folder, and the last row of the run's metrics; adapters on the one fine-tuned model."""
    folder = whole
    if request.param == "qlora":
        pytest.importorskip("bitsandbytes")
    if request.param in LORA:
        tuned = str(whole / "run/1-sft/model")
        folder = run(
            tmp_path_factory.mktemp(request.param), {"model": tuned, "stages": [{"train": TRAIN | LORA[request.param]}]}
        )
    rows = [json.loads(line) for line in (trained(folder) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/sampled_reward"] > rows[0]["eval/sampled_reward"], "it has learned something"
    return folder / "out", rows[-1]


def close(a: float, b: float) -> bool:
    """Whether two means of `EPISODES` rewards of 0 or 1 are within four standard errors of each other."""
    p = (a + b) / 2
    return abs(a - b) <= 4 * math.sqrt(2 * p * (1 - p) / EPISODES)


def measured(folder: Path, *words: str) -> float:
    file = folder.parent / f"{'-'.join(words).strip('-')}.json"
    said("eval", "--model", str(folder), "--env", "Arithmetic-v0", *words, "--out", str(file))
    return float(json.loads(file.read_text())["reward"]["mean"])


def played(folder: Path, *, sample: bool) -> tuple[list[float], list[list[int]]]:
    """Rewards and replies on the evaluation's problems, with nothing of ours but the environment."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    env = gymnasium.make("llm_gym/Arithmetic-v0", tokenizer=str(folder), split="test")
    seeds = range(EVAL_SEED, EVAL_SEED + EPISODES)
    torch.manual_seed(0)
    replies = generated(model, [env.reset(seed=seed)[0] for seed in seeds], sample)
    rewards = []
    for seed, reply in zip(seeds, replies, strict=True):
        env.reset(seed=seed)
        _, reward, terminated, truncated, _ = env.step(np.array(reply, np.int32))
        assert terminated or truncated
        rewards.append(float(reward))
    env.close()
    return rewards, replies


def generated(model: Any, contexts: list[Any], sample: bool) -> list[list[int]]:
    """A reply to each; contexts of one length are a batch, so that none is padded."""
    how = {"do_sample": True, "temperature": 1.0} if sample else {"do_sample": False, "temperature": None}
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    replies: list[list[int]] = [[] for _ in contexts]
    for length in {len(context) for context in contexts}:
        rows = [row for row, context in enumerate(contexts) if len(context) == length]
        ids = torch.from_numpy(np.stack([contexts[row] for row in rows])).long()
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, top_k=0, **how)
        for row, tokens in zip(rows, made[:, length:].tolist(), strict=True):
            behind = [at + 1 for at, token in enumerate(tokens) if token in ends]
            replies[row] = tokens[: min(behind, default=len(tokens))]  # then padding, while others go on
    return replies


def test_eval_reproduces_the_training_evaluation(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, row = exported
    words = ("--episodes", str(EPISODES))
    assert measured(folder, *words, "--greedy") == row["eval/greedy_reward"]
    assert measured(folder.parent / "run", *words, "--greedy") == row["eval/greedy_reward"], "of the run folder too"
    assert close(measured(folder, *words, "--sampled", "--seed", "5"), row["eval/sampled_reward"])


def test_plain_transformers_reproduces_the_training_evaluation(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, row = exported
    rewards, replies = played(folder, sample=False)
    assert np.mean(rewards) == row["eval/greedy_reward"]
    file = trained(folder.parent) / "episodes" / f"eval_{row['step']:06d}.jsonl"
    kept = [decode(json.loads(line)).turns[0].completion.tokens.tolist() for line in file.read_text().splitlines()]
    assert len(kept) == 64
    assert replies[:64] == kept, "token for token"
    assert close(float(np.mean(played(folder, sample=True)[0])), row["eval/sampled_reward"])
