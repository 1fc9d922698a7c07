"""On-policy distillation: the student plays, a teacher judges every token that it said.

    llmgym distill --env Arithmetic-v0 --teacher runs/big

The loop is the trainer's: draw, roll out, pack, step, refresh, write. Only what a token earns is different (see
`distill_learner`): not the episode's reward, but how much likelier the teacher finds it.
"""

from __future__ import annotations

from typing import Any

from llm_gym.harness.config import TrainConfig
from llm_gym.harness.loops.distill_learner import check_distill
from llm_gym.harness.loops.trainer import Trainer


class Distiller(Trainer):
    """A `Trainer` whose configuration must name a teacher; arguments and errors are the trainer's."""

    def __init__(self, config: TrainConfig, **how: Any) -> None:
        check_distill(config)
        super().__init__(config, **how)
