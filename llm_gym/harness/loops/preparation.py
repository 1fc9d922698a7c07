"""Everything about a run that can be known before a model loads, looked at in one place.

`Trainer` begins with it, and `llmgym run` does it for every stage before the first one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.advantages import AdvantageFn, advantage
from llm_gym.harness.data.mixture import EnvSpec
from llm_gym.harness.data.selection import Selection
from llm_gym.harness.data.stream import Stream
from llm_gym.harness.distributed.world import World
from llm_gym.harness.evaluation.evaluator import EvalTask
from llm_gym.harness.learner.optimizers import check_optimizer
from llm_gym.harness.loops.environments import env_specs, eval_tasks_of, selection_of
from llm_gym.harness.loops.trials import learns_nothing, try_functions
from llm_gym.harness.model.loading import check_model, config_of
from llm_gym.harness.runs import loggers
from llm_gym.harness.settings import check_complete
from llm_gym.harness.weight_sync.engines import check

if TYPE_CHECKING:
    from llm_gym.harness.config import TrainConfig


@dataclass(frozen=True)
class Prepared:
    """What a run plays and how it is weighed; every setting that can be judged without a model is sound."""

    env_specs: Sequence[EnvSpec]
    eval_tasks: Sequence[EvalTask]
    selection: Selection | Stream
    compute_advantages: AdvantageFn


def prepare_run(config: TrainConfig, world: World, *, learns: bool = True) -> Prepared:
    """Looks at a whole configuration, its model's config, environments, data and functions.

    Args:
        config: resolved.
        world: the processes that train together.
        learns: whether it will train; a run that only plays may have settings that teach nothing.

    Raises:
        SettingError: something that is not there or cannot work, or could not teach anything.
    """
    check_complete(config)
    compute_advantages = advantage(config.advantage)
    check(config, world)
    config.stream.check_served(ranks=world.size, players=config.cluster.players)
    check_optimizer(config.optimizer)
    loggers.check(config.log)
    check_model(config.model, lora=config.lora, memory=config.memory, device=world.device)
    _check_stops(config)
    if config.checkpoint.keep_best and not config.eval.episodes:
        raise ConfigError("checkpoint.keep_best: got True with eval.episodes=0, so no step would be known as the best.")
    try_functions(config)
    if learns and config.distill is None and not config.loss.needs_every_sequence:
        _check_credit(config, compute_advantages)
    found = env_specs(config)
    return Prepared(
        found, eval_tasks_of(config, found), selection_of(config, found, world, learns=learns), compute_advantages
    )


def _check_stops(config: TrainConfig) -> None:
    """Looks whether the model can say the tokens that are to end a completion."""
    vocabulary = config_of(config.model).get_text_config().vocab_size
    for token in config.sampling.stop_token_ids or ():
        if not 0 <= token < vocabulary:
            raise ConfigError(f"sampling.stop_token_ids: got {token}, but the model knows {vocabulary} tokens.")


def _check_credit(config: TrainConfig, compute_advantages: AdvantageFn) -> None:
    """Looks whether episodes of such groups can earn any credit."""
    if learns_nothing(compute_advantages, config.prompts_per_step, config.group_size):
        raise ConfigError(
            f"group_size: got {config.group_size}, but advantage {config.advantage!r} compares the episodes of a "
            "group, and so would teach nothing; pass at least 2, or an advantage without groups (none, reinforce_pp)."
        )
