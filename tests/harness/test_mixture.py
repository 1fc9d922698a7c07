"""Mixtures, curricula, over-sampling and failing rewards in real runs of the embedded model."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from test_trainer import StopAfter, stable, weights

from llm_gym import report
from llm_gym.core import Episode, StopReason
from llm_gym.env import Reply, TextEnv
from llm_gym.envs import make
from llm_gym.episode_files import decode
from llm_gym.errors import ConfigError, RewardError, SettingError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.evaluation.evaluator import Evaluation
from llm_gym.harness.loops import group_learner
from llm_gym.harness.loops.environments import env_specs
from llm_gym.harness.loops.observer import Observer

ROWS = 12


class Two(TextEnv):
    """Two turns, so that it ends later than the other environment; rows, too."""

    num_tasks = 5

    def open(self):
        self.row = self.draw_task(5)
        return [{"role": "user", "content": f"Say {self.row}."}]

    def reply(self, text: str) -> Reply:
        parts = {"digits": sum(c.isdigit() for c in text) / (1 + len(text)), "short": 0.25}
        return Reply(messages=[{"role": "user", "content": "Again."}], reward=parts, done=self._turn == 2)


class Picky(TextEnv):
    """The reward function fails for every third seed, in one of several ways."""

    nonsense: object = None

    def open(self):
        return [{"role": "user", "content": "Speak."}]

    def reply(self, text: str) -> Reply:
        broken = self.np_random_seed % 3 == 0 or self.always
        return Reply(reward=self.nonsense if broken else len(text) / 100, done=True)  # type: ignore[arg-type]

    def __init__(self, *, always: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.always = always


for name, kind in {"Two": Two, "Picky": Picky}.items():
    if f"test/{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"test/{name}-v0", entry_point=kind)

SMALL = ["eval.episodes=2", "sampling.max_tokens=10", "prompts_per_step=6", "group_size=3", "checkpoint.every=2"]
MIXTURE = ({"env": "test/Digits-v0", "weight": 2}, {"env": "test/Two-v0", "curriculum": {"name": "epochs"}})


def config(*sets: str, **given) -> TrainConfig:
    return load(TrainConfig, sets=[*SMALL, *sets], **given)


def episodes(run: Path, name: str) -> list[Episode]:
    return [decode(json.loads(line)) for line in (run / "episodes" / f"{name}.jsonl").open()]


def coin(text: str, row: dict) -> float:
    """Passes or not as the text falls; from never to always, as the row says."""
    return float(zlib.crc32(text.encode()) % 4 < row["ease"])


@pytest.fixture
def coins(tmp_path: Path) -> dict[str, object]:
    """Rows with pass rates from 0 to 1."""
    lines = [{"prompt": f"Count from {i}.", "ease": i % 5} for i in range(ROWS)]
    (tmp_path / "coins.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"dataset": str(tmp_path / "coins.jsonl"), "reward": f"{__name__}:coin"}


def test_a_mixture_plays_each_environment_by_its_weight(tmp_path: Path) -> None:
    rows = Trainer(config(steps=2, envs=MIXTURE), out=tmp_path / "run").train()
    for step in (1, 2):
        played = episodes(tmp_path / "run", f"step_{step:06d}")
        assert Counter(e.env_id for e in played) == {"test/Digits-v0": 12, "test/Two-v0": 6}
        assert [e.env_id for e in played[::3]].count("test/Two-v0") == 2
        for name in ("test/Digits-v0", "test/Two-v0"):
            own = [e.reward for e in played if e.env_id == name]
            assert rows[step][f"reward/mean/{name}"] == pytest.approx(np.mean(own))
        assert rows[step]["reward/mean"] == pytest.approx(np.mean([e.reward for e in played]))
        assert all((e.task is not None) == ("Two" in e.env_id) for e in played)
        assert max(len(e.turns) for e in played) == 2
    assert rows[1]["policy/grad_norm"] > 0
    drawn = [
        e.task for step in (1, 2) for e in episodes(tmp_path / "run", f"step_{step:06d}")[::3] if "Two" in e.env_id
    ]
    assert len(set(drawn)) == 4
    assert load(TrainConfig, tmp_path / "run" / "config.yaml") == config(steps=2, envs=MIXTURE).resolved()


def test_the_best_step_of_a_mixture_is_that_of_all_its_environments(tmp_path: Path, monkeypatch) -> None:
    """By weights 2 : 1, step 2 is best; the first environment alone would say step 1, an even mean step 3."""
    measured = iter([(0.0, 0.0), (0.9, 0.0), (0.8, 0.5), (0.4, 1.2), (math.nan, 9.0)])

    def measure(self, play):
        first, second = next(measured)
        return {"eval/sampled_reward": first, "eval/test-Two-v0/sampled_reward": second}, {}

    monkeypatch.setattr(Evaluation, "__call__", measure)
    sets = ["eval.every=1", "checkpoint.keep_best=true", "prompts_per_step=3"]
    rows = Trainer(config(*sets, steps=4, envs=MIXTURE), out=tmp_path / "run").train()
    assert [row["eval/mixture_reward"] for row in rows[:4]] == pytest.approx([0, 0.6, 0.7, 2 / 3])
    assert rows[4]["eval/mixture_reward"] is None
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step_000002"


def test_each_environment_of_a_mixture_keeps_its_reward_weights_and_limits(tmp_path: Path) -> None:
    envs = [
        {"env": "test/Two-v0", "name": "plain"},
        {"env": "test/Two-v0", "name": "heavy", "env_args": {"reward_weights": {"short": 3.0}, "max_tokens": 5}},
    ]
    run = Trainer(config("advantage=gdpo", "overlong=0.5", steps=1, envs=envs), out=tmp_path / "run")
    assert [spec.limit for spec in run.env_specs] == [10, 5]
    groups = run.collect().groups
    assert {e.env_id for g in groups for e in g.episodes} == {"plain", "heavy"}
    for g in groups:
        heavy = g.episodes[0].env_id == "heavy"
        for e in g.episodes:
            assert e.reward == pytest.approx(e.rewards["digits"] + (3 if heavy else 1) * e.rewards["short"])
            assert all(len(t.completion.tokens) <= (5 if heavy else 10) for t in e.turns)
    assert run.learning.batches(groups)[0].episodes == 18
    run.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"envs": [{"env": "Aritmetic-v0"}]}, "did you mean 'Arithmetic-v0'"),
        ({"envs": [{"env": "Arithmetic-v0"}] * 2}, "envs: 2 are called 'llm_gym/Arithmetic-v0'; give each a name"),
        ({"envs": [{"weight": 1}]}, "an entry names no environment"),
        ({"envs": [{"env": "Arithmetic-v0", "weight": 0}]}, r"envs\[0\].weight: got 0.0, want a value > 0"),
        ({"envs": [{"env": "Arithmetic-v0", "wieght": 1}]}, r"envs\[0\].weight"),
        ({"curriculum": {"name": "epochs"}}, "Arithmetic-v0 has no rows to choose from"),
        ({"filters": {"spraed": 0}}, "did you mean 'spread'"),
        ({"oversample": {"max_factor": 2}}, "set filters.spread=0"),
    ],
)
def test_mistakes_are_found_before_the_model_loads(tmp_path: Path, monkeypatch, given, said) -> None:
    monkeypatch.setattr(group_learner, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SettingError, match=said):
        Trainer(config(**given), out=tmp_path / "run")


def test_one_policy_has_one_tokenizer(tmp_path: Path) -> None:
    tokenizer = make("Arithmetic-v0").unwrapped.chat.tokenizer  # type: ignore[attr-defined]
    tokenizer.save_pretrained(tmp_path / "same")
    args = {"env_args": {"tokenizer": str(tmp_path / "same")}}
    assert len(env_specs(config(envs=[{"env": "Arithmetic-v0"}, {"env": "GuessNumber-v0", **args}]))) == 2
    file = tmp_path / "same" / "tokenizer.json"
    told = json.loads(file.read_text())
    first, second, *_ = sorted(told["model"]["vocab"], key=told["model"]["vocab"].get)[300:]
    told["model"]["vocab"][first], told["model"]["vocab"][second] = (told["model"]["vocab"][w] for w in (second, first))
    (tmp_path / "other").mkdir()
    for part in (tmp_path / "same").iterdir():
        (tmp_path / "other" / part.name).write_bytes(part.read_bytes())
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(told))
    args = {"env_args": {"tokenizer": str(tmp_path / "other")}}
    with pytest.raises(ConfigError, match="'llm_gym/GuessNumber-v0' has another tokenizer than"):
        env_specs(config(envs=[{"env": "Arithmetic-v0"}, {"env": "GuessNumber-v0", **args}]))


HARD = ["curriculum.name=difficulty", "filters.spread=0", "oversample.max_factor=3"]
MORE = {"mixture": (["minibatches=2"], {"envs": MIXTURE}), "oversampled": (HARD, {"env": "Dataset-v0"})}


@pytest.mark.parametrize("kind", MORE)
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, kind: str, coins: dict) -> None:
    sets, given = MORE[kind]
    given = given | ({"env_args": coins} if "env" in given else {})
    whole = Trainer(config(*sets, steps=5, **given), out=tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(*sets, steps=5, **given), out=tmp_path / "cut", observer=StopAfter(4)).train()
    again = Trainer(config(*sets, steps=5, **given), out=tmp_path / "cut", resume=True)
    assert again.step == 2
    assert stable(again.train()) == stable(whole)
    ends = [weights(tmp_path / run / "checkpoints" / "step_000005") for run in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    if kind == "oversampled":
        assert sum(row["groups/reused"] for row in whole[1:]) > 0
        assert max(row["sampler/staleness_max"] for row in whole[1:]) == 1


def test_epochs_play_every_row_once(tmp_path: Path, coins: dict) -> None:
    given = {"env": "Dataset-v0", "env_args": coins}
    Trainer(config("curriculum.name=epochs", "group_size=2", steps=4, **given), out=tmp_path / "run").train()
    played = [episodes(tmp_path / "run", f"step_{step:06d}") for step in range(1, 5)]
    for epoch in (played[:2], played[2:]):
        assert Counter(e.task for step in epoch for e in step) == dict.fromkeys(range(ROWS), 2)
    orders = [[e.task for step in epoch for e in step] for epoch in (played[:2], played[2:])]
    assert orders[0] != orders[1]
    with Path(str(coins["dataset"])).open() as file:
        questions = [json.loads(line)["prompt"] for line in file]
    assert all(e.messages[0]["content"] == questions[e.task] for step in played for e in step if e.task is not None)


def test_left_overs_are_trained_on_with_the_log_probabilities_they_were_sampled_with(
    tmp_path: Path, coins: dict
) -> None:
    given = {"env": "Dataset-v0", "env_args": coins}
    run = Trainer(
        config(*HARD, "group_size=2", "optimizer.lr=0.001", "optimizer.warmup_steps=0", steps=6, **given),
        out=tmp_path / "run",
    )
    seen: dict[tuple[int, int], list[float]] = {}
    stale = 0
    while run.step < 6:
        harvest = run.selection.collect(run.step, run.playing)
        for e in harvest.played:
            assert e.turns[0].completion.version == run.step
            seen[e.seed, e.member] = e.turns[0].completion.logprobs.tolist()
        for e in harvest.episodes:
            assert e.turns[0].completion.logprobs.tolist() == seen[e.seed, e.member]
        old = [e for e in harvest.episodes if e.turns[0].completion.version < run.step]
        stale += len(old)
        learned = run.learning.learn(harvest.groups, run.step)
        if old:
            assert learned["sampler/logprob_gap_max"] > 1e-3  # the weights have moved since
        elif harvest.groups:
            assert learned["sampler/logprob_gap_max"] < 1e-4
        run.step += 1
        run.sync(run.step)
    assert stale > 0
    run.close()


class Listens(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("more", [[], ["minibatches=3", "epochs=2", "loss.correction.name=tis"], ["advantage=gdpo"]])
def test_a_step_without_a_group_changes_nothing_and_says_so(tmp_path: Path, more: list[str]) -> None:
    listens = Listens()
    run = Trainer(
        config("filters.min_reward=99", *more, steps=2, env="test/Digits-v0"), out=tmp_path / "run", observer=listens
    )
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    rows = run.train()
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    assert [note for note in listens.notes if "no group passed" in note] == [
        f"step {step}: no group passed the filters; the weights stay as they are." for step in (1, 2)
    ]
    assert [row["groups/dropped/min_reward"] for row in rows[1:]] == [6, 6]
    assert rows[1]["policy/loss"] == rows[1]["policy/grad_norm"] == rows[1]["tokens/trained"] == 0
    assert rows[1]["reward/mean"] > 0
    assert episodes(tmp_path / "run", "step_000001") == []
    assert len(episodes(tmp_path / "run", "dropped_000001")) == 18
    assert report.write(tmp_path / "run").is_file()


def test_fewer_groups_than_minibatches_are_trained_on(tmp_path: Path) -> None:
    run = Trainer(config("minibatches=6", steps=1, env="test/Digits-v0"), out=tmp_path / "run")
    harvest = run.collect()
    assert run.learning.learn(harvest.groups[:2], run.step)["policy/grad_norm"] > 0
    run.close()


@pytest.mark.parametrize(
    "nonsense", [None, "good", float("nan"), float("inf"), [1.0], np.ones(3), {"a": None}], ids=str
)
def test_a_failing_reward_costs_its_episodes_and_is_counted(tmp_path: Path, monkeypatch, nonsense) -> None:
    monkeypatch.setattr(Picky, "nonsense", nonsense)
    rows = Trainer(config("prompts_per_step=12", steps=1, env="test/Picky-v0"), out=tmp_path / "run").train()
    played = episodes(tmp_path / "run", "step_000001")
    failed = [e for e in played if e.stop_reason is StopReason.REWARD_ERROR]
    assert 0 < len(failed) == sum(e.seed % 3 == 0 for e in played) < len(played)
    assert all(f"seed {e.seed}" in str(e.error) and "test/Picky-v0" in str(e.error) for e in failed)
    assert rows[1]["episode/reward_failed_fraction"] == len(failed) / len(played)
    assert rows[1]["policy/grad_norm"] > 0
    assert np.isfinite(rows[1]["policy/loss"])


def test_a_reward_that_always_fails_stops_the_run_at_once(tmp_path: Path) -> None:
    said = (
        "reward: it failed on each of the first .* tasks of test/Picky-v0; .*reward component 'reward' is None at seed"
    )
    always = {"env": "test/Picky-v0", "env_args": {"always": True}}
    for part, sets in (("eval", []), ("step", ["eval.episodes=0"])):
        with pytest.raises(RewardError, match=said):
            Trainer(config(*sets, steps=3, **always), out=tmp_path / part).train()
    envs = [{"env": "test/Digits-v0"}, {"env": "test/Picky-v0", "env_args": {"always": True}}]
    with pytest.raises(RewardError, match=said):
        Trainer(config(steps=3, envs=envs), out=tmp_path / "mixed").train()


def test_dapo_fills_its_steps(tmp_path: Path, coins: dict) -> None:
    given = {"env": "Dataset-v0", "env_args": coins, "preset": "dapo"}
    rows = Trainer(config("group_size=4", steps=3, **given), out=tmp_path / "run").train()
    for row in rows[1:]:
        kept = episodes(tmp_path / "run", f"step_{row['step']:06d}")
        groups = [[e.reward for e in kept[i : i + 4]] for i in range(0, len(kept), 4)]
        assert all(max(g) > min(g) for g in groups)
        assert len(groups) == row["groups/trained"] == 6
        assert row["groups/played"] > 6
