"""What all adapters of other suites have: global generators kept apart, seeds by split, packages that may be missing."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from llm_gym.cli.group import llmgym
from llm_gym.envs import make
from llm_gym.envs.adapters.foreign import ROOM, STARTS, GlobalRandom
from llm_gym.envs.adapters.packages import NEEDS, missing
from llm_gym.errors import ConfigError

UNUSUAL: dict[str, dict[str, Any]] = {
    "Gymnasium-v0": {"name": "MiniGrid-Empty-5x5-v0"},
    "ReasoningGym-v0": {"size": 4321},  # no data set that the process has made before
    "TextArena-v0": {},
}
GENERATORS: tuple[Callable[[], float], ...] = (random.random, np.random.random)


@pytest.mark.parametrize("draw", GENERATORS)
def test_each_has_a_stream_of_its_own_and_the_process_keeps_its(draw: Callable[[], float]) -> None:
    random.seed(5)
    np.random.seed(5)
    plain = [draw() for _ in range(4)]
    alone = {}
    for seed in (1, 2):
        own = GlobalRandom()
        own.seed(seed)
        with own:
            alone[seed] = [draw() for _ in range(4)]
    assert alone[1] != alone[2]

    random.seed(5)
    np.random.seed(5)
    both = {seed: GlobalRandom() for seed in (1, 2)}
    for seed, own in both.items():
        own.seed(seed)
    drawn: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(4):
        for seed, own in both.items():
            with own:
                drawn[seed].append(draw())
        drawn[0].append(draw())
    assert drawn == {0: plain, **alone}


def test_the_states_come_back_after_an_exception() -> None:
    before = random.getstate()
    own = GlobalRandom()

    def fail() -> None:
        with own:
            random.random()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert random.getstate() == before
    with own:  # and the next one may begin
        pass


def test_no_seed_of_one_split_reaches_the_other() -> None:
    starts = sorted(STARTS.values())
    assert all(two - one >= ROOM for one, two in pairwise(starts))
    assert starts[-1] + ROOM <= 2**32  # numpy's
    with pytest.raises(ConfigError, match="size: got .* want at most"):
        make("ReasoningGym-v0", size=ROOM + 1)


@pytest.mark.parametrize("env", ["ReasoningGym-v0", "TextArena-v0", "Gymnasium-v0"])
def test_a_package_that_is_missing_is_one_sentence_with_the_line_that_brings_it(
    env: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, extra = NEEDS[env]
    assert missing(env) == ""
    monkeypatch.setitem(sys.modules, module, None)
    line = f"pip install 'llm-gym[{extra}]'"
    with pytest.raises(ConfigError, match="is not installed") as error:
        make(env, **UNUSUAL[env])
    assert line in str(error.value)
    listed = CliRunner().invoke(llmgym, ["envs"]).stdout.splitlines()
    assert [text for text in listed if line in text] == [text for text in listed if text.startswith(env)]


def test_an_unknown_split_names_the_two() -> None:
    with pytest.raises(ConfigError, match="split: unknown value 'trian'; did you mean 'train'"):
        make("Gymnasium-v0", split="trian")
