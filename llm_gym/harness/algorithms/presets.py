"""Published algorithms as rows of one table: which advantage, loss and normaliser each of them is.

A preset is a set of defaults, no setting of its own: `load(TrainConfig, preset="dapo")`, `preset: dapo` in a
YAML file, `--preset dapo` or `--set preset=dapo`. Whatever the file or `--set` says wins over it. Numbers are the
papers'; learning rates and batch sizes are not part of a preset. KL terms are left out (each needs a second
model): add `loss.kl` and `loss.kl_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, Mapping[str, Any]] = {
    # https://arxiv.org/abs/2402.03300
    "grpo": {"advantage": "group_norm", "loss": {"name": "ppo_clip", "normaliser": "sequence"}},
    # https://arxiv.org/abs/2503.20783
    "dr_grpo": {"advantage": "dr_grpo", "loss": {"name": "ppo_clip", "normaliser": "constant"}},
    # https://arxiv.org/abs/2503.14476; it samples without a bound, 10 is verl's
    "dapo": {
        "advantage": "group_norm",
        "overlong": 0.2,
        "filters": {"spread": 0},
        "oversample": {"max_factor": 10.0},
        "loss": {"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "normaliser": "token_global"},
    },
    # https://arxiv.org/abs/2507.18071, section 5.1
    "gspo": {
        "advantage": "group_norm",
        "loss": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "normaliser": "sequence"},
    },
    # https://arxiv.org/abs/2507.20673, ratios in (e^-0.4, e^0.4)
    "gmpo": {
        "advantage": "group_norm",
        "loss": {"name": "gmpo", "clip_low": 0.3297, "clip_high": 0.4918, "normaliser": "sequence"},
    },
    # https://arxiv.org/abs/2506.13585; the bound 5 is that of https://arxiv.org/abs/2510.13786
    "cispo": {
        "advantage": "group_norm",
        "loss": {"name": "cispo", "clip_low": 1.0, "clip_high": 4.0, "normaliser": "token_global"},
    },
    # https://arxiv.org/abs/2511.20347
    "sapo": {"advantage": "group_norm", "loss": {"name": "sapo", "normaliser": "sequence"}},
    # https://arxiv.org/abs/2402.14740
    "rloo": {"advantage": "rloo", "loss": {"name": "reinforce", "normaliser": "constant"}},
    # https://arxiv.org/abs/2501.03262
    "reinforce_pp": {"advantage": "reinforce_pp", "loss": {"name": "ppo_clip", "normaliser": "token_global"}},
    "reinforce_pp_baseline": {
        "advantage": "reinforce_pp_baseline",
        "loss": {"name": "ppo_clip", "normaliser": "token_global"},
    },
    # https://arxiv.org/abs/2601.05242
    "gdpo": {"advantage": "gdpo", "loss": {"name": "ppo_clip", "normaliser": "sequence"}},
}
