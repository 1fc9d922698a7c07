"""The other loops, each a function of (folder, strategy): run by the test alone, and by several ranks as a program.

python loop_ranks.py <folder> <function> ...      # under torchrun's variables
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ranks  # noqa: F401, knows where the other tests are
import torch
from click.testing import CliRunner
from test_sft import INIT, wild, write
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llm_gym import embedded
from llm_gym.cli.group import llmgym
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.config import CheckpointConfig
from llm_gym.harness.distributed.fsdp import whole
from llm_gym.harness.distributed.world import ParallelConfig, here
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.loops import sft as module
from llm_gym.harness.loops.pipeline import read_plan, run_plan
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.loops.sft import SFTConfig, SFTEvalConfig, sft
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.model.loading import new_model, prepare
from llm_gym.harness.model.lora import LoraConfig
from llm_gym.harness.runs.run_folder import RunFolder

SMOOTH: dict[str, Any] = {"eps": 1e-3, "schedule": "constant"}
SMALL = ["eval.episodes=4", "prompts_per_step=3", "group_size=4", "sampling.max_tokens=8", "checkpoint.every=1"]
SMALL += ["checkpoint.keep=9", "optimizer.lr=1e-3", "optimizer.eps=1e-3", "optimizer.schedule=constant"]


def tuning(folder: Path, strategy: str, name: str, **fields: Any) -> SFTConfig:
    """Settings of a small fine-tuning; its held-out set has two rows, so that a third rank has none."""
    held_out = {"eval": SFTEvalConfig(dataset=str(folder / "held_out.jsonl"))}
    optimizer = OptimizerConfig(lr=1e-2, **SMOOTH)
    plain: dict[str, Any] = {"steps": 3, "examples_per_step": 2, "optimizer": optimizer, **held_out}
    plain |= {"dataset": str(folder / "chats.jsonl"), "parallel": ParallelConfig(strategy, timeout=200)}
    return SFTConfig(**{**plain, "out": str(folder / name), **fields})


def data(folder: Path) -> None:
    write(folder / "chats.jsonl", wild())
    write(folder / "held_out.jsonl", wild()[-3:-1])


def tuned(folder: Path, strategy: str) -> dict[str, Any]:
    """In float64: gradients of every step, weights at the end, metrics, and how many micro-batches this rank had."""
    found = {}
    for name, lora, each in (("few", None, 2), ("lora", LoraConfig(rank=4), 5)):
        torch.manual_seed(1)
        model = prepare(new_model(INIT, seed=3).double(), lora=lora)
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(parameter, std=0.1)
        found[name] = watched(tuning(folder, strategy, f"{strategy}-{name}", examples_per_step=each), model)
    return found


def watched(config: SFTConfig, model: Any) -> dict[str, Any]:
    gradients: list[dict[str, Any]] = []
    passes: list[int] = []
    pack = module.pack_rows

    def counted(budget: Any, rows: Any) -> Any:
        batch = pack(budget, rows)
        passes.append(len(batch.micro))
        return batch

    def keep(*_: Any) -> None:
        some = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({name: whole(grad).clone() for name, grad in some.items()})

    module.pack_rows = counted
    hook = register_optimizer_step_pre_hook(keep)
    try:
        sft(config, model=model, progress=False)
    finally:
        hook.remove()
        module.pack_rows = pack
    return {"gradients": gradients, "passes": passes}


def begun(folder: Path, strategy: str) -> None:
    """Half of a run from a random start, with a budget that it chooses itself."""
    sft(half(folder, strategy, f"{strategy}-begun", 2), progress=False)


def ended(folder: Path, strategy: str) -> None:
    """The other half of what one process has begun."""
    sft(half(folder, strategy, f"{strategy}-ended", 4), resume=True, progress=False)


def half(folder: Path, strategy: str, name: str, steps: int) -> SFTConfig:
    saved = CheckpointConfig(every=2, keep=1)
    config = tuning(folder, strategy, name, steps=steps, init=INIT, checkpoint=saved, examples_per_step=3)
    return replace(config, token_budget="auto")


def commanded(folder: Path, strategy: str) -> str:
    """What the command says, started as a rank."""
    words = ["--dataset", str(folder / "chats.jsonl"), "--steps", "2", "--out", str(folder / f"{strategy}-commanded")]
    words += ["--set", f"parallel.strategy={strategy}"]
    done = CliRunner().invoke(llmgym, ["sft", "--nproc", str(here()[1]), *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def distilled(folder: Path, strategy: str) -> None:
    """Two steps towards a teacher in each process, and towards one behind a server that all ask."""
    url = (folder / "teacher_url").read_text()
    for name, teacher, kl in (("local", str(folder / "teacher"), "full"), ("served", url, "top_k")):
        sets = [*SMALL, f"distill.teacher={teacher}", f"distill.kl={kl}", "distill.top_k=4", "token_budget=auto"]
        config = load(TrainConfig, sets=[*sets, f"parallel.strategy={strategy}"], steps=2)
        Trainer(config, out=folder / f"{strategy}-{name}").train()


def played(folder: Path, strategy: str) -> dict[str, Any]:
    """Steps written without training; the same run trained; both trained again from the episodes alone."""
    config = load(TrainConfig, sets=[*SMALL, f"parallel.strategy={strategy}", "loss.entropy_weight=0.1"], steps=2)
    Trainer(config, out=folder / f"{strategy}-played").train(rollout_only=True)
    Trainer(config, out=folder / f"{strategy}-trained").train()
    again = [(r.metrics, r.tensors, r.differences) for r in replay(folder / f"{strategy}-trained", 2)]
    from_start = list(replay(folder / f"{strategy}-played", 1, out=folder / f"{strategy}-model"))
    return {"again": again, "from_start": [(r.metrics, r.differences) for r in from_start]}


def staged(folder: Path, strategy: str) -> None:
    """Fine-tuning, then an adapter, which is folded in, then the whole model."""
    tune = {"dataset": str(folder / "chats.jsonl"), "steps": 2, "examples_per_step": 3}
    tune |= {"optimizer": {"lr": 1e-3, **SMOOTH}, "parallel": {"strategy": strategy}}
    train = {"steps": 1, "prompts_per_step": 2, "group_size": 4, "sampling": {"max_tokens": 8}, "eval": {"episodes": 0}}
    train |= {"optimizer": {"lr": 1e-3, "eps": 1e-3}, "loss": {"entropy_weight": 0.1}}
    stages = [{"sft": tune}, {"train": {**train, "lora": {"rank": 2}}}]
    stages.append({"train": {**train, "parallel": {"strategy": strategy}}})
    file = folder / f"{strategy}-{here()[0]}.yaml"
    file.write_text(json.dumps({"stages": stages}))
    run_plan(read_plan(file), folder / f"{strategy}-staged")


def teacher(folder: Path) -> None:
    """The embedded model with moved weights, as a folder."""
    from llm_gym.harness.model.loading import load_model

    torch.manual_seed(0)
    model = load_model(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    module.save(model, module.load_tokenizer(str(embedded.PATH)), folder / "teacher")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).metrics()


def main(folder: Path, strategies: list[str], names: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    for name in names:
        for strategy in strategies:
            found[name, strategy] = globals()[name](folder, strategy)
    torch.save(found, folder / f"found-{here()[0]}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
