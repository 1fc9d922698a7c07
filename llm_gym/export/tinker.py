"""Tinker's environments (https://github.com/thinking-machines-lab/tinker-cookbook, version 0.5): both sides speak ids.

Through Tinker's servers they reach other trainers too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from llm_gym.core import StopReason
from llm_gym.errors import LLMGymError
from llm_gym.rollouts.env_pool import Env, EnvPool, EnvSlot

STOPS = {StopReason.ANSWERED: "completed", StopReason.TURN_LIMIT: "max_turns", StopReason.TOKEN_LIMIT: "max_tokens"}
"""Ends of episodes by the words of the cookbook, where it has one; the others are called as ours."""


def tinker_env(env: str | Callable[..., Env], seed: int, /, **env_args: Any) -> Any:
    """`tinker_cookbook.rl.types.Env`, for one episode: the task of `seed`.

    Give `tokenizer=` the model's. A completion that the sampler cut (`extra`'s stop reason is `length`) ends the
    episode, as in a rollout of ours. An episode that fails raises, and the cookbook's rollout strategy decides; reward
    components are metrics of the last step, `reward/NAME`, and so is its end, `stop/NAME`.

    Raises:
        SettingError: an unknown id, wrong arguments; from `initial_observation`.
    """
    return _kind()(env, seed, env_args)


class Played:
    """One episode; `tinker_env` makes it an `Env` of the cookbook's."""

    def __init__(self, env: str | Callable[..., Env], seed: int, env_args: Mapping[str, Any]) -> None:
        self._pool, self._seed = EnvPool(env, env_args), seed
        self._slot: EnvSlot | None = None

    async def initial_observation(self) -> tuple[Any, list[int]]:
        """The first context, and the ids that end a completion."""
        self._slot = slot = await self._pool.take()
        context, _ = await slot.call(slot.reset, seed=self._seed)
        return _input(context), self._stops()

    async def step(self, action: Sequence[int], *, extra: Mapping[str, Any] | None = None) -> Any:
        """The next context, of which what the last one held and the action are the beginning.

        Raises:
            LLMGymError: the episode failed for no fault of the policy.
        """
        from tinker_cookbook.rl.types import StepResult

        slot, metrics = self._slot, dict[str, float]()
        assert slot is not None
        context, reward, terminated, truncated, info = await slot.call(slot.step, np.array(action, np.int32))
        cut = (extra or {}).get("stop_reason") == "length"
        if done := terminated or truncated or cut:
            stop = StopReason(info.get("stop_reason", StopReason.TOKEN_LIMIT))
            stop = StopReason.TOKEN_LIMIT if cut and stop is StopReason.ANSWERED else stop
            self._pool.close()
            if stop.failed:
                raise LLMGymError(f"{self._pool.env_id}: the episode of seed {self._seed} ended with {stop}.")
            metrics = {f"reward/{name}": value for name, value in info.get("rewards", {}).items()}
            metrics[f"stop/{STOPS.get(stop, stop)}"] = 1.0
        return StepResult(float(reward), done, _input(context), self._stops(), metrics)

    def _stops(self) -> list[int]:
        assert self._slot is not None
        return list(self._slot.env.unwrapped.chat.stop_ids)  # type: ignore[attr-defined]


def _input(context: Any) -> Any:
    import tinker

    return tinker.ModelInput.from_ints([int(token) for token in context])


@cache
def _kind() -> Any:
    from tinker_cookbook.rl import types

    return type("LLMGymEnv", (Played, types.Env), {"__doc__": Played.__doc__})
