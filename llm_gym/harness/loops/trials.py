"""A user's own functions, tried on a tiny example before anything loads: what they take, and what they give.

What is known of the example is all that their contracts promise. A function that reads more (the name of a reward
component, a text) may raise a `LookupError` or the like here, and be right in the run: such errors prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Turn
from llm_gym.errors import FAULTS, ConfigError, place
from llm_gym.harness.algorithms.advantages import ADVANTAGES, AdvantageFn, advantage
from llm_gym.harness.algorithms.importance_sampling import CORRECTIONS, importance_weights
from llm_gym.harness.algorithms.kl import KL, kl_loss
from llm_gym.harness.algorithms.losses import LOSSES, LossConfig, loss_function
from llm_gym.harness.algorithms.normalisers import NORMALISERS, normaliser_of
from llm_gym.harness.algorithms.rewards import Rewards
from llm_gym.harness.algorithms.streams import Streams
from llm_gym.harness.data.curriculum import CURRICULA, CurriculumConfig, check_drawn
from llm_gym.harness.data.filters import FILTERS, filters
from llm_gym.harness.registry import attempt, by_name
from llm_gym.trajectories import trajectories

if TYPE_CHECKING:
    from llm_gym.harness.config import TrainConfig

UNKNOWING = (LookupError, ValueError, ArithmeticError, AssertionError)
"""What a function may raise that reads more of an example than its contract promises."""
SEQUENCE = torch.tensor([0, 0, 0, 1, 1])
"""Two sequences of three tokens and two."""


def try_functions(config: TrainConfig) -> None:
    """Tries every function that a run's settings name by import path, its curricula apart.

    Raises:
        ConfigError: one cannot be called so, or gives something else; names the setting, file and line.
    """
    loss = config.loss
    if loss.name not in LOSSES:
        _try_loss(loss)
    if loss.kl not in KL and loss.kl != "none":
        function = by_name("loss.kl", loss.kl, KL)
        attempt("loss.kl", function, *_logprobs()[:2], form="(logprobs [M], reference's [M]) -> [M]")
        kl_loss(*_logprobs(), kind=loss.kl)
    if loss.correction.name not in CORRECTIONS and loss.correction.name != "none":
        function, form = (
            by_name("loss.correction.name", loss.correction.name, CORRECTIONS),
            "(ratio [M], low, high) -> [M]",
        )
        attempt("loss.correction.name", function, torch.ones(5), loss.correction.low, loss.correction.high, form=form)
        importance_weights(*_logprobs()[:2], SEQUENCE, loss.correction)
    if loss.normaliser not in NORMALISERS:
        function, counts = normaliser_of(loss.normaliser), np.array([3, 2])
        attempt("loss.normaliser", function, counts, loss.constant_length, form="(counts [E], length) -> weights [E]")
    if config.advantage not in ADVANTAGES:
        advantage(config.advantage)(_rewards(2, 2), UNKNOWING)
    for name, passes in filters(config.filters).items():
        if name not in FILTERS:
            passes(_group(), UNKNOWING)


def try_curriculum(config: CurriculumConfig, rows: int, seed: tuple[int, ...]) -> None:
    """Makes a user's curriculum of an environment's rows, and has it draw two.

    Raises:
        ConfigError: it cannot be made or called so, or draws a row that is not there.
    """
    make = by_name("curriculum.name", config.name, CURRICULA)
    where, form = "curriculum.name", "(rows, seed, settings) -> a curriculum (`curriculum.Curriculum`)"
    made = attempt(where, make, rows, seed, config, form=form)

    def use() -> None:
        drawn = list(made.draw(2))
        check_drawn(made, drawn, 2, rows)
        made.learn(drawn[0], 1, 1)
        made.load_state_dict(json.loads(json.dumps(made.state_dict())))

    use.__wrapped__ = make  # type: ignore[attr-defined]  # a failure is told as its author's, not of this line
    attempt(where, use, form="draw(2), learn(row, 1, 1), state_dict() (as JSON has it) and load_state_dict(state)")


def learns_nothing(compute_advantages: AdvantageFn, groups: int, size: int) -> bool:
    """Whether credit is 0 whatever is earned by so many groups of so many episodes."""
    try:
        return not np.any(compute_advantages(_rewards(min(groups, 3), min(size, 3))))
    except FAULTS:  # a user's own, that reads more of the example
        return False


# Examples


def _try_loss(loss: LossConfig) -> None:
    new, old, _ = _logprobs()
    streams = Streams(new, old, torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]), SEQUENCE, -new.detach())
    function: Callable[..., Any] = loss_function(loss.name)
    form = "(streams, settings) -> (loss [M], metrics)"
    found, _ = attempt("loss.name", function, streams, loss, form=form)
    if not found.requires_grad:
        raise ConfigError(f"loss.name: {place(function)} gave a loss that does not depend on streams.logprobs.")
    if getattr(function, "by_advantage", False):
        found, _ = attempt("loss.name", function, replace(streams, advantages=torch.zeros(5)), loss, form=form)
        if found.any() or (found.requires_grad and torch.autograd.grad(found.sum(), new)[0].any()):
            raise ConfigError(
                f"loss.name: {place(function)} is declared `by_advantage`, but its value or gradient where every "
                f"advantage is 0 is not: it gave {found.tolist()}; drop the declaration."
            )


def _logprobs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the policy, the sampler and a reference, [5] each; the first is differentiable."""
    new = torch.tensor([-1.0, -0.5, -2.0, -1.5, -0.1], requires_grad=True)
    return new, new.detach() - 0.01, new.detach() + 0.1


def _rewards(groups: int, size: int) -> Rewards:
    """Returns that all differ, earned in one turn each by one component."""
    returns = np.arange(groups * size, dtype=np.float64).reshape(groups, size) ** 2 / (groups * size)
    return Rewards(returns, returns[..., None], returns[..., None], ("reward",), np.ones((groups, 1)))


def _group() -> Group:
    """Two episodes of a turn, one of which earned something."""
    ids, said = np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)
    completion = Completion(said, np.full(2, -0.5, np.float32), "stop")
    messages = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})

    def episode(member: int, reward: float) -> Episode:
        said = trajectories([Turn(ids, completion, reward)])
        return Episode("example", 0, said, StopReason.ANSWERED, {"reward": reward}, messages, member)

    return Group(Task(0, 0), (episode(0, 0.0), episode(1, 1.0)))
