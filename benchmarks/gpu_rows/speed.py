"""How fast the learner is and what thrift costs; the demo on the device; a step beside TRL's."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from gpu_rows.exact import PEAKS, product_rate
from gpu_rows.models import fields, free, learner, seconds
from gpu_rows.rows import Found, Setting
from llm_gym.embedded import PATH
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.learner import memory_probe
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.token_budget import probe
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.model.loading import LoraConfig
from llm_gym.harness.model.memory import MemoryConfig
from llm_gym.harness.settings import load


def flops_of_a_token(of: dict[str, Any], length: int, *, adapters: bool) -> float:
    """Floating-point operations that a trained token needs, forward and backward, in rows of `length`.

    Recomputed layers count once. Under frozen weights backward has one product for each, not two; the few of adapters
    are left out, so that their share is a lower bound.
    """
    heads, groups, size = of["num_attention_heads"], of["num_key_value_heads"], of["head_dim"]
    attention = of["hidden_size"] * size * (2 * heads + 2 * groups)
    layer = attention + 3 * of["hidden_size"] * of["intermediate_size"]
    weights = of["num_hidden_layers"] * layer + of["hidden_size"] * of["vocab_size"]
    scores = of["num_hidden_layers"] * heads * size * length / 2  # a token sees half of its row, on average
    return (4 if adapters else 6) * weights + 12 * scores


def learning(setting: Setting, found: Found, *, shape: str, checkpointing: int) -> None:
    """Tokens a second and the share of the device's rate, by row length, all weights and adapters."""
    rate = product_rate(setting)
    name = torch.cuda.get_device_name() if setting.device == "cuda" else ""
    peak = next((flops for part, flops in PEAKS.items() if part in name.split()), None)
    tokens = 256 if setting.small else 16384
    memory = MemoryConfig(checkpointing=checkpointing)
    for kind, lora in (("all weights", None), ("LoRA", LoraConfig(rank=16))):
        mine = learner(shape, setting, lora=lora, memory=memory)
        for length in (tokens // 4, tokens):
            batch = probe(mine, tokens, row=length)
            norm = mine.step(batch)["policy/grad_norm"]
            taken: list[float] = []
            most = memory_probe.peak(
                mine.device, lambda b=batch, m=mine, t=taken: t.extend(_times(setting, m, b, 1 if setting.small else 3))
            )
            title = f"{kind}, rows of {length:,}"
            found.add(f"{title}: tok/s", tokens / min(taken))
            done = flops_of_a_token(fields(shape, setting), length, adapters=lora is not None) * tokens / min(taken)
            if peak is not None:
                found.add(f"{title}: MFU %", 100 * done / peak)
            found.add(f"{title}: % of a plain product's rate", 100 * done / rate)
            found.add(f"{title}: GB above weights and state", most / 1e9)
            found.holds(f"{title}: gradient is finite and not 0", 0 < norm < float("inf"))
        del mine, batch
        free()


def _times(setting: Setting, mine: Learner, batch: Any, count: int) -> list[float]:
    return [seconds(setting.device, lambda: mine.step(batch)) for _ in range(count)]


def learning_small_model(setting: Setting, found: Found) -> None:
    """Qwen3-0.6B, nothing recomputed."""
    learning(setting, found, shape="0.6B", checkpointing=0)


def learning_large_model(setting: Setting, found: Found) -> None:
    """Qwen3-4B, every layer recomputed."""
    learning(setting, found, shape="4B", checkpointing=1)


def thrift(setting: Setting, found: Found, **how: Any) -> None:
    """A learner with some thrift against one without: the same gradient, its peak and its time."""
    tokens = 2048 if setting.small else 16384
    norms, peaks, times = [], [], []
    for given in ({}, how):
        mine = learner("0.6B", setting, **given)
        batch = probe(mine, tokens)
        mine.step(batch)
        times.append(min(_times(setting, mine, batch, 2)))
        before = memory_probe.free(mine.device)
        peaks.append(memory_probe.peak(mine.device, lambda m=mine, b=batch: m.forward_backward(b)))
        norms.append(mine.optim_step()["policy/grad_norm"])
        found.add(f"{'with' if given else 'without'}: peak MB", peaks[-1] / 1e6)
        found.add(f"{'with' if given else 'without'}: free GB between steps", before / 1e9)
        del mine, batch
        free()
    found.add("peak over peak without", peaks[1] / peaks[0])
    found.add("time over time without", times[1] / times[0])
    found.add("gradient norm over norm without", norms[1] / norms[0], least=0.99, most=1.01)


def checkpointing(setting: Setting, found: Found) -> None:
    """Every layer is computed again in backward."""
    thrift(setting, found, memory=MemoryConfig(checkpointing=1))


def offload(setting: Setting, found: Found) -> None:
    """The same, and what is kept waits in pinned CPU memory."""
    thrift(setting, found, memory=MemoryConfig(checkpointing=1, offload=True))


def optimizer_in_8_bits(setting: Setting, found: Found) -> None:
    """AdamW with moments in 8 bits."""
    thrift(setting, found, name="adamw8bit")


USUAL = {10: (0.45, 0.61), 30: (0.60, 0.80)}
"""Last of ten steps -> where the mean reward of the ten lies: seeds 0 to 4 on a CPU give .53 and .70."""


def demo(setting: Setting, found: Found) -> None:
    """The first steps of `llmgym train`, with the schedule of all 120."""
    config = load(TrainConfig, sets=[f"device={setting.device}", "eval.episodes=0", "checkpoint.every=0"])
    trainer = Trainer(config, out=setting.folder / "run", observer=object())
    rows = []
    for _ in range(3 if setting.small else 30):
        rows.append(trainer.train_step())
        if (bounds := USUAL.get(len(rows))) is not None:
            reward = statistics.mean(row["reward/mean"] for row in rows[-10:])
            found.add(f"mean reward of steps {len(rows) - 9} to {len(rows)}", reward, least=bounds[0], most=bounds[1])
    found.add("reward of the first step", rows[0]["reward/mean"], least=0.3, most=0.7)
    found.add("largest gap of engine and learner", max(row["sampler/logprob_gap_max"] for row in rows), most=1e-3)
    for name in ("time/step", "time/rollout", "time/train", "time/sync"):
        found.add(f"{name}, s", statistics.median(row[name] for row in rows[1:]))
    trainer.close()


def beside_trl(setting: Setting, found: Found) -> None:
    """A GRPO step of TRL and of ours on the embedded model (benchmarks/grpo_step.py)."""
    import grpo_step

    steps = 2 if setting.small else 5
    data = grpo_step.problems(grpo_step.PROMPTS * steps)
    theirs, their_length = grpo_step.trl_block(steps, data, str(PATH), setting.device)
    found.add("TRL: s a step", theirs)
    ours, our_length = grpo_step.our_block(steps, str(PATH), setting.device)
    found.add("ours: s a step", ours)
    found.add("TRL over ours", theirs / ours)
    found.add("tokens a completion, theirs over ours", their_length / our_length, least=0.7, most=1.4)
