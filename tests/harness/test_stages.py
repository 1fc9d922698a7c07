"""Stages: each from what the one before has made, checked before the first, resumed at the right one."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from llm_gym import embedded
from llm_gym.cli.group import llmgym
from llm_gym.errors import CheckpointError, ConfigError, SettingError
from llm_gym.harness.loops import pipeline
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.pipeline import check_plan, read_plan, run_plan
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.runs.lineage import last_stage, lineage, locate
from llm_gym.harness.runs.run_folder import RunFolder

TRAIN = {
    "env": "Arithmetic-v0",
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 4,
    "sampling": {"max_tokens": 8},
    "eval": {"episodes": 4},
    "optimizer": {"lr": 0.01},
    "checkpoint": {"every": 1},
    "loss": {"entropy_weight": 1.0},
}
"""Cut replies earn nothing here; the entropy moves the weights."""


@pytest.fixture
def tune(tmp_path: Path) -> dict[str, Any]:
    chats = [{"prompt": f"{i}+{i}?", "completion": str(2 * i)} for i in range(8)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    optimizer = {"lr": 0.01}
    return {"dataset": str(tmp_path / "chats.jsonl"), "steps": 2, "examples_per_step": 4, "optimizer": optimizer}


def plan(tmp_path: Path, *items: Any, sets: tuple[str, ...] = (), **top: Any) -> pipeline.Plan:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**top, "stages": list(items)}))
    return read_plan(tmp_path / "plan.yaml", sets)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


class DieAt(Observer):
    """Interrupts the run when a row of this step is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_row(self, row: Any) -> None:
        if row["step"] == self.step:
            raise KeyboardInterrupt


def test_each_stage_starts_where_the_former_ended(tmp_path: Path, tune: dict[str, Any]) -> None:
    distill = {**TRAIN, "loss": {}, "distill": {"teacher": str(embedded.PATH), "kl": "full"}}
    made = plan(tmp_path, {"sft": tune}, {"train": {**TRAIN, "lora": {"rank": 2}}}, {"distill": distill})
    ended = []
    last = run_plan(made, tmp_path / "out", done=lambda stage, folder: ended.append((stage.name, folder.name)))
    assert ended == [("1-sft", "1-sft"), ("2-train", "2-train"), ("3-distill", "3-distill")]
    assert last == str(tmp_path / "out/3-distill/checkpoints/step_000002")
    configs = [yaml.safe_load((tmp_path / "out" / name / "config.yaml").read_text()) for name, _ in ended]
    assert [c["model"] for c in configs[1:]] == [
        str(tmp_path / "out/1-sft/model"),
        str(tmp_path / "out/2-train/merged"),
    ]
    start = load_model(None).state_dict()
    seen = [start, weights(tmp_path / "out/1-sft/model"), weights(tmp_path / "out/2-train/merged"), weights(last)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert len({float(each[name].double().sum()) for each in seen}) == 4, "every stage moved the weights"
    assert last_stage(tmp_path / "out") == tmp_path / "out/3-distill"
    assert [run.kind for run in lineage(locate(tmp_path / "out"))] == ["sft", "train", "distill"]


@pytest.mark.parametrize("dies", ["1-sft", "2-train"])
def test_a_stopped_run_goes_on_at_its_stage(tmp_path: Path, tune: dict[str, Any], monkeypatch, dies: str) -> None:
    made = plan(tmp_path, {"sft": {**tune, "checkpoint": {"every": 1}}}, {"train": TRAIN})
    whole = run_plan(made, tmp_path / "whole")
    played = []
    play = pipeline.play

    def watched(stage: Any, *rest: Any) -> None:
        played.append(stage.name)
        play(stage, *rest)

    monkeypatch.setattr(pipeline, "play", watched)
    if dies == "1-sft":
        from llm_gym.harness.loops import sft as module

        step = module.train_step

        def dies_later(learner: Any, data: Any, number: int) -> Any:
            if number == 1:
                raise KeyboardInterrupt
            return step(learner, data, number)

        with monkeypatch.context() as broken:
            broken.setattr(module, "train_step", dies_later)
            with pytest.raises(KeyboardInterrupt):
                run_plan(made, tmp_path / "cut")
    else:
        with pytest.raises(KeyboardInterrupt):
            run_plan(made, tmp_path / "cut", observer=lambda stage: DieAt(2))
    with pytest.raises(CheckpointError, match="--resume"):
        run_plan(made, tmp_path / "cut")
    played.clear()
    again = run_plan(made, tmp_path / "cut", resume=True)
    assert played == (["1-sft", "2-train"] if dies == "1-sft" else ["2-train"])
    ends = [weights(folder) for folder in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    played.clear()
    assert run_plan(made, tmp_path / "cut", resume=True) == again
    assert played == []


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, complete, in `out`; their plan beside it."""
    folder = tmp_path_factory.mktemp("two")
    made = plan(folder, {"train": {**TRAIN, "lora": {"rank": 2}}}, {"train": TRAIN})
    run_plan(made, folder / "out")
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("2.optimizer.lr=0.5", ("optimizer.lr: got 0.5 in place of 0.01", "2-train", "done 2 steps of 2")),
        ("2.group_size=8", ("group_size: got 8 in place of 4", "2-train")),
        ("1.optimizer.lr=0.5", ("1-train: optimizer.lr: got 0.5 in place of 0.01", "2-train has begun", "--out")),
        ("1.steps=3", ("1-train: steps: got 3 in place of 2", "2-train has begun", "--out")),
    ],
)
def test_a_stage_that_is_complete_keeps_its_settings(two: Path, given: str, words: tuple[str, ...]) -> None:
    before = contents(two / "out")
    arguments = ["run", str(two / "plan.yaml"), "--resume", "--out", str(two / "out"), "--set", given]
    for _ in range(2):  # the first refusal leaves nothing that would let the second pass
        done = CliRunner().invoke(llmgym, arguments)
        assert done.exit_code == 2, done.output
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Error: ")
        assert all(word in last for word in words), last
    after = contents(two / "out")
    assert {name for name in before if after.get(name) != before[name]} == set()


def test_the_last_stage_may_be_given_more_steps(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "out", tmp_path / "out", symlinks=True)  # which moves the model of the second stage
    more = read_plan(two / "plan.yaml", ["2.steps=3"])
    assert run_plan(more, tmp_path / "out", resume=True).endswith("checkpoints/step_000003")
    assert yaml.safe_load((tmp_path / "out/stages.yaml").read_text())["stages"][1]["train"]["steps"] == 3
    assert len(lineage(locate(tmp_path / "out"))) == 2


def test_a_longer_tuning_that_was_stopped_hands_on_no_shorter_one(tmp_path: Path, tune: dict[str, Any]) -> None:
    tune = {**tune, "checkpoint": {"every": 1}}
    run_plan(plan(tmp_path, {"sft": tune}), tmp_path / "out")
    longer = plan(tmp_path, {"sft": tune}, {"train": {**TRAIN, "steps": 1}}, sets=("1.steps=4",))
    log = RunFolder.log

    def dies(run: RunFolder, row: Any) -> None:
        log(run, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(RunFolder, "log", dies)
        with pytest.raises(KeyboardInterrupt):
            run_plan(longer, tmp_path / "out", resume=True)
    run_plan(longer, tmp_path / "out", resume=True)
    assert (tmp_path / "out/1-sft/checkpoints/step_000004").is_dir()
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/1-sft/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    ends = [weights(tmp_path / "out/1-sft" / name) for name in ("model", "checkpoints/step_000004")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_default_rates_are_those_of_the_model_s_size(tmp_path: Path, tune: dict[str, Any]) -> None:
    settings = {k: v for k, v in TRAIN.items() if k != "optimizer"}
    run_plan(plan(tmp_path, {"sft": tune}, {"train": settings}, sets=("2.steps=1",)), tmp_path / "out")
    found = yaml.safe_load((tmp_path / "out/2-train/config.yaml").read_text())
    assert (found["steps"], found["optimizer"]["lr"]) == (1, 2e-4), "though a folder is loaded"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "want a list such as"),
        ([{"train": {}, "sft": {}}], r"stages\[1\]: got"),
        (["train"], r"stages\[1\]: got 'train'"),
        ([{"trian": {}}], "did you mean 'train'"),
        ([{"train": {"step": 3}}], r"stages\[1\]: .*did you mean 'steps'"),
        ([{"train": {"model": "x"}}], r"stages\[1\].model: got 'x', but a stage starts from the one before"),
        ([{"sft": {"out": "x"}}], r"stages\[1\].out"),
        ([{"distill": {}}], r"stages\[1\]: a `distill` stage"),
        ([{"train": {"distill": {"teacher": "x"}}}], r"stages\[1\]: a `distill` stage"),
        ([{"train": {}}, {"sft": {"init": {"model_type": "qwen3"}}}], r"stages\[2\].init"),
    ],
)
def test_plans_that_make_no_sense_are_refused(tmp_path: Path, items: list, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, *items)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"train": {"env": "Arithmetc-v0"}}, "2-train: .*did you mean"),
        ({"sft": {"dataset": "none.jsonl"}}, "2-sft: .*no file"),
        ({"distill": {"distill": {"teacher": "no/such/model/here"}}}, "2-distill: .*no/such/model/here"),
        ({"train": {"policy": {"engine": "vlm"}}}, "2-train: .*vllm"),
    ],
)
def test_a_later_stage_is_looked_at_before_the_first_begins(tmp_path: Path, item: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        run_plan(plan(tmp_path, {"train": TRAIN}, item), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_and_sets_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="did you mean 'stages'"):
        plan(tmp_path, {"train": {}}, stage=[])
    for text in ("steps=3", "3.steps=3", "0.steps=1"):
        with pytest.raises(ConfigError, match="want the number of a stage first"):
            plan(tmp_path, {"train": {}}, sets=(text,))
    check_plan(plan(tmp_path, {"train": TRAIN}, model=str(embedded.PATH)))


def test_a_later_stage_is_looked_at_as_what_several_processes_would_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "here", lambda: (0, 2))
    split = {"policy": {"sync": "shared"}, "parallel": {"strategy": "fsdp"}}
    with pytest.raises(SettingError, match="2-train: policy.sync: 'shared' does not work with .* a split learner"):
        check_plan(plan(tmp_path, {"train": TRAIN}, {"train": split}))


def test_what_a_stopped_run_says_goes_on_with_what_it_was_given() -> None:
    from llm_gym.cli.run import again, command

    given = {"model": "a model", "sets": ("1.steps=3", "2.env_args={a: 'b c'}"), "nproc": 2, "out": Path("o ut")}
    words = shlex.split(again("plan.yaml", **given))
    assert words[:2] == ["llmgym", "run"]
    assert command.make_context("run", words[2:]).params == {"file": "plan.yaml", "resume": True, **given}
