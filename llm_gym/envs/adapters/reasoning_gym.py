"""`ReasoningGym-v0`: any data set of reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

from llm_gym.core import Messages
from llm_gym.env import Reply
from llm_gym.envs.adapters import answers
from llm_gym.envs.adapters.foreign import ROOM, STARTS, ForeignEnv
from llm_gym.envs.adapters.packages import load
from llm_gym.errors import FAULTS, BadReply, ConfigError, check_counts, described, ended, unknown

INSTRUCTION = "Give the final answer inside <answer></answer>."
REMEMBERED = 256
"""Items of a data set that are kept."""
OWN = ("seed", "size")
"""Settings of a data set that the environment chooses."""


class ReasoningGym(ForeignEnv):
    """One procedural problem, one reply, the data set's own score.

    Args:
        name: the data set, such as `chain_sum`.
        level: a step of the data set's curriculum, 0 the easiest, for all of its attributes at once (one that has fewer
            steps stays at its hardest); None: the data set's own defaults.
        config: settings of the data set by name, as `{"min_terms": 3}`; they go before those of `level`.
        threshold: a score below it is 0. With 0 there is partial credit, in many data sets for wrong answers too
            (docs/adapters.md); with 1 an answer is right or wrong.
        size: problems in a split.
        instruction: a line put after the problem; an answer is read from nowhere but between its tags.
        max_tokens: most tokens in the reply.
        kwargs: the common arguments of `TextEnv`.

    Reward component: `score`, 0 to 1; 0 for an empty answer.

    Raises:
        ConfigError: an unknown data set, level or setting, or reasoning-gym is not installed.
    """

    reward_names = ("score",)
    example_replies = ("<answer>7</answer>", "<answer>[1, 2]</answer>", "<answer>no</answer>", "<answer> </answer>")

    def __init__(
        self,
        *,
        name: str = "chain_sum",
        level: int | None = None,
        config: Mapping[str, Any] | None = None,
        threshold: float = 0.0,
        size: int = 10_000,
        instruction: str = INSTRUCTION,
        max_tokens: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_tokens=max_tokens, **kwargs)
        check_counts({"size": size})
        if size > ROOM:
            raise ConfigError(f"size: got {size}, want at most {ROOM}.")
        try:
            settings = json.dumps(dict(config or {}), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config: got {config!r:.80}, want names and plain values.") from error
        self.name, self.threshold, self.instruction = name, threshold, instruction
        with self.globals:
            self.data, self.problem = data_set(name, level, settings, STARTS[self.split], size)
        self.num_tasks: int = size

    def open(self) -> Messages:
        """The problem, and how to answer it."""
        seed = self.draw_seed(self.num_tasks)
        with self.globals:
            self.entry: Mapping[str, Any] = deepcopy(self.problem(seed - STARTS[self.split]))
        self.globals.seed(seed)  # for the scorer, whether the problem was remembered or not
        return [{"role": "user", "content": f"{self.entry['question']}\n\n{self.instruction}".rstrip()}]

    def reply(self, text: str) -> Reply:
        """Scores the answer; the episode is over. A scorer that raises could not read it: `BadReply`."""
        _, opened, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
        answer = answer.strip()
        if not opened or not answer:
            return Reply(reward={"score": 0.0}, done=True)
        answers.check(self.name, answer)
        try:
            with self.globals:
                score = float(self.data.score_answer(answer, self.entry))
        except FAULTS as error:
            raise BadReply(described(error)) from error
        return Reply(reward={"score": score if score >= self.threshold else 0.0}, done=True)


@lru_cache(maxsize=256)
def data_set(name: str, level: int | None, settings: str, seed: int, size: int) -> tuple[Any, Callable[[int], Any]]:
    """A data set, and its items by number; one for all environments of the process, as some read files or build tables.

    The newest items are remembered, as all episodes of a group ask for the same, and some take seconds to make. Never
    change one.

    Args:
        name: its name.
        level: a step of its curriculum.
        settings: its other settings, as JSON.
        seed: item i is drawn from seed + i.
        size: how many items there are.

    Raises:
        ConfigError: an unknown one, or a value that it refuses.
    """
    factory = load("ReasoningGym-v0").factory
    if name == "composite":
        raise ConfigError("name: 'composite' mixes other data sets; give them as several environments (docs/data.md).")
    if name not in factory.DATASETS:
        raise ConfigError(unknown("name", name, factory.DATASETS.keys() - {"composite"}))
    kind, config_kind = factory.DATASETS[name]
    given = json.loads(settings)
    known = {field.name for field in dataclasses.fields(config_kind)} - {*OWN}
    if wrong := given.keys() - known:
        raise ConfigError(unknown(f"config of {name}", min(wrong), known))
    try:
        config = config_kind(seed=seed, size=size) if level is None else _at_level(factory, name, level, seed, size)
        config = dataclasses.replace(config, **given)
        made = kind(config=config)
    except ConfigError:
        raise
    except FAULTS as error:
        raise ConfigError(f"name: {name!r} refuses level={level}, config={given}: {ended(described(error))}") from error
    answers.disarm(name, sys.modules[kind.__module__])
    return made, lru_cache(maxsize=REMEMBERED)(made.__getitem__)


def _at_level(factory: Any, name: str, level: int, seed: int, size: int) -> Any:
    """The settings of a step of a data set's curriculum."""
    if not factory.has_curriculum(name):
        raise ConfigError(f"level: {name!r} has no curriculum; use config.")
    curriculum = factory.create_curriculum(name)
    steps = max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=1)
    if not 0 <= level < steps:
        raise ConfigError(f"level: got {level}, want 0 to {steps - 1} for {name!r}.")
    curriculum.set_global_level(level)
    return curriculum.generate_configuration({"seed": seed, "size": size})
