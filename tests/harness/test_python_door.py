"""A run that is written in Python: functions and other objects among its settings."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops.starting import load_group_learner
from llm_gym.harness.settings import dump, to_dict


def length(text: str, row) -> float:
    """A reward that any model earns a little of."""
    return 1 / (1 + len(text))


def spread(group, limit) -> bool:
    return True


def written(tmp_path: Path, reward, **given) -> TrainConfig:
    """A tiny run on a data set of two rows."""
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in ("one", "two")))
    small = {"sampling": {"max_tokens": 4}, "prompts_per_step": 2, "group_size": 2, "eval": {"episodes": 0}, "steps": 1}
    args = {"dataset": data, "reward": reward}
    return TrainConfig(env="Dataset-v0", env_args=args, **{**small, **given})  # type: ignore[arg-type]


def test_a_run_with_a_function_of_a_module_goes_on_from_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = Trainer(written(tmp_path, [length]), out=out).train()
    assert rows[-1]["reward/mean"] > 0
    assert yaml.safe_load((out / "config.yaml").read_text())["env_args"]["reward"] == [f"{__name__}:length"]
    more = Trainer(load(TrainConfig, out / "config.yaml", steps=2), out=out, resume=True).train()
    assert more[-1]["step"] == 2


def test_a_run_with_a_function_that_no_import_finds_goes_on_if_it_is_passed_again(tmp_path: Path) -> None:
    out, reward = tmp_path / "run", lambda text, row: length(text, row)
    Trainer(written(tmp_path, reward), out=out).train()
    with pytest.raises(ConfigError) as error:
        Trainer(load(TrainConfig, out / "config.yaml", steps=2), out=out, resume=True)
    assert str(error.value) == (
        f"env_args.reward: the run was given {__name__}.{reward.__qualname__} in Python, of which config.yaml keeps "
        "only the name; pass it again, or put a function into a module and pass package.module:function."
    )
    more = Trainer(written(tmp_path, reward, steps=2), out=out, resume=True).train()
    assert more[-1]["step"] == 2


@pytest.mark.parametrize(
    ("thing", "written"),
    [
        (length, f"{__name__}:length"),
        (Path, "pathlib:Path"),
        (Path("a/b"), "a/b"),
        (partial(length, row={}), "given in Python: an object of functools.partial"),
        (lambda: 0, f"given in Python: {__name__}.<lambda>"),
        ({"right": [length]}, {"right": [f"{__name__}:length"]}),
    ],
)
def test_an_object_is_written_down_as_what_it_is(thing, written) -> None:
    config = TrainConfig(env_args={"it": thing})
    assert to_dict(config)["env_args"]["it"] == written
    assert yaml.safe_load(dump(config))["env_args"]["it"] == written


def test_a_setting_that_names_a_function_takes_the_function() -> None:
    config = TrainConfig(filters={spread: 1}, advantage=length)  # type: ignore[arg-type, dict-item]
    assert (dict(config.filters), config.advantage) == ({f"{__name__}:spread": 1}, f"{__name__}:length")
    with pytest.raises(
        ConfigError, match=r"advantage: got <function .*<lambda>.*, want a function at the top of a mod"
    ):
        TrainConfig(advantage=lambda rewards: rewards)  # type: ignore[arg-type]


def test_the_loop_of_the_docs_learns_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from pathlib.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["metrics"]["tokens/trained"] > 0
    assert names["metrics"]["sampler/logprob_gap_max"] < 1e-4
    again = load_group_learner(names["config"], checkpoint=tmp_path / "learned").learner
    assert again.step_count == 2
    ours = names["learning"].model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.model.state_dict().items())
