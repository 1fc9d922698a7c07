"""The learning rate where the settings leave it open: chosen by what is trained, and how.

A rate that suits a model of a million weights ruins one of a billion, and one for a billion teaches the small one
nothing; adapters want a larger one than the weights they stand for; Muon's has another unit. So it depends on

- the loop and the model's hidden size: `FULL`, on a straight line in logarithms between two entries, flat beyond
  them. The ends are what was measured here or published; between them nobody has measured much;
- adapters: ten times the rate of the weights, whatever the rank (`ADAPTERS`);
- the optimizer: Adafactor's rate and that of 8 bits mean what AdamW's means; Muon's is `muon_rate`;
- the run that made the model: one of the same loop, adapters and optimizer passes its own rate on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llm_gym import embedded
from llm_gym.errors import CheckpointError
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.lora import LoraConfig
from llm_gym.harness.runs.lineage import locate
from llm_gym.hub import offline_if_unreachable

FULL: Mapping[str, tuple[tuple[int, float], ...]] = {
    # 128: benchmarks/defaults.py. 896 (0.5B) and more: https://arxiv.org/abs/2402.03300 (7B), 2503.14476 (32B),
    # 2503.20783 (1.5B, 7B), and the defaults of TRL and verl, are all 1e-6.
    "train": ((128, 2e-4), (896, 1e-6)),
    # 896 and more: https://arxiv.org/abs/2411.15124 (Tulu 3: 8B 5e-6, 70B 2e-6), 2306.04751 (7B 2e-5); TRL: 2e-5.
    "sft": ((128, 5e-4), (896, 1e-5)),
    # Random weights. 128: the embedded model's recipe; the others: table 2.1 of https://arxiv.org/abs/2005.14165.
    "scratch": ((128, 2e-3), (768, 6e-4), (2048, 2e-4), (4096, 1.2e-4)),
}
"""Loop -> (hidden size, peak rate of AdamW for all weights). Distillation on a student's own samples is as `train`."""

ADAPTERS = 10.0
"""Rate of adapters over that of all weights (https://thinkingmachines.ai/blog/lora, for any rank)."""
UNKNOWN = 4096
"""Hidden size of a model that does not tell."""


@dataclass(frozen=True, slots=True)
class Rates:
    """A choice."""

    lr: float
    muon_lr: float
    """Of Muon's matrices; no other optimizer reads it."""
    why: str
    """In a few words."""

    def fill(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """The settings with what they leave open."""
        muon = optimizer.name == "muon" and optimizer.muon_lr is None
        return replace(
            optimizer,
            lr=self.lr if optimizer.lr is None else optimizer.lr,
            muon_lr=self.muon_lr if muon else optimizer.muon_lr,
        )

    def words(self, optimizer: OptimizerConfig) -> str:
        """What a run with these settings says of its rates, on one line."""
        filled = self.fill(optimizer)
        muon = f", {filled.muon_lr:g} for Muon's matrices" if optimizer.name == "muon" else ""
        return f"learning rate {filled.lr:g}{muon} ({self.why if filled.lr == self.lr else 'as set'})"


def rates(loop: str, optimizer: OptimizerConfig, lora: LoraConfig | None, *, model: str | None, width: int) -> Rates:
    """The rates for a run.

    Args:
        loop: `train`, `distill`, `sft`, or `scratch` (from random weights).
        optimizer: its name counts, and a rate that is set: Muon's follows it.
        lora: the adapters; None: every weight is trained.
        model: what is loaded, a folder or hub id, to find the run that made it; None: no run did.
        width: hidden size of what is trained, from `hidden_size`.
    """
    before = _passed_on(loop, optimizer, lora, Path(model)) if model is not None else None
    lr, why = before or by_size(loop, width, lora)
    return Rates(lr, muon_rate(lr if optimizer.lr is None else optimizer.lr, width), why)


def by_size(loop: str, width: int, lora: LoraConfig | None = None) -> tuple[float, str]:
    """The rate for a hidden size, to two digits, and why.

    >>> by_size("train", 128), by_size("train", 4096, LoraConfig())
    ((0.0002, 'all weights, hidden size 128'), (1e-05, 'adapters (lora), hidden size 4096'))
    """
    rate = _between(FULL.get(loop, FULL["train"]), width)
    if lora is None:
        return _rounded(rate), f"all weights, hidden size {width}"
    # An adapter's output is scaled by alpha / rank, rslora's by alpha / sqrt(rank): so much further it moves.
    rate *= ADAPTERS / (math.sqrt(lora.rank) if lora.kind == "rslora" else 1.0)
    return _rounded(rate), f"adapters ({lora.kind}), hidden size {width}"


def muon_rate(lr: float, width: int) -> float:
    """Muon's rate with which its matrices move as far as AdamW's would at `lr`, to two digits.

    An orthogonal update of an [n, n] matrix has a root mean square of rate / sqrt(n); AdamW's is 0.2 to 0.4 times
    its rate (https://arxiv.org/abs/2502.16982, section 2.2). With 0.4 the embedded model learns best.
    """
    return _rounded(0.4 * math.sqrt(width) * lr)


def hidden_size(model: str | Mapping[str, Any] | None) -> int:
    """Of a folder, a hub id, or a config given as a mapping; None: the embedded model. Only the config is read.

    Without one that can be read (loading the model will say why) it is that of a large model.
    """
    try:
        if isinstance(model, Mapping):
            config = AutoConfig.for_model(**model)
        else:
            name = str(embedded.PATH) if model is None else _under_adapter(model)
            with offline_if_unreachable(name):
                config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN
    return int(getattr(config.get_text_config(), "hidden_size", UNKNOWN))


def _under_adapter(model: str) -> str:
    """Of a folder that holds an adapter alone the model that it belongs to; any other as it is."""
    file = Path(model) / "adapter_config.json"
    if (Path(model) / "config.json").is_file() or not file.is_file():
        return model
    below = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    return _under_adapter(str(below)) if below else str(embedded.PATH)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def _between(points: tuple[tuple[int, float], ...], width: int) -> float:
    """Linear between neighbouring points, both axes in logarithms; flat beyond the ends."""
    if width <= points[0][0]:
        return points[0][1]
    for (low, first), (high, last) in pairwise(points):
        if width <= high:
            share = math.log(width / low) / math.log(high / low)
            return first * math.exp(share * math.log(last / first))
    return points[-1][1]


def _passed_on(loop: str, optimizer: OptimizerConfig, lora: LoraConfig | None, model: Path) -> tuple[float, str] | None:
    """The rate of the run that made a model, if it was trained in the same way."""
    try:
        source = locate(model.parent if model.name in ("model", "merged") else model)
    except CheckpointError:
        return None
    used: Mapping[str, Any] = source.config.get("optimizer") or {}
    adapters = source.config.get("lora") or {}
    same = source.kind == loop and used.get("name") == optimizer.name and adapters.get("kind") == (lora and lora.kind)
    lr = used.get("lr")
    return (float(lr), f"as {source.run} was trained") if same and isinstance(lr, int | float) and lr > 0 else None
