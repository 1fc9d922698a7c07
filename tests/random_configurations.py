"""Random configurations of every loop, each run to its end, killed and resumed, and replayed.

`tests/harness/test_random_configurations.py` takes sixteen, `benchmarks/random_runs.py` hundreds. What must hold of
each: nothing is raised but this project's own errors; killed and resumed it is the run that was never killed (which
is also: one seed, one run); replay finds every bit again; another token budget gives the same gradient; and where all
rewards are equal no weight moves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gymnasium
import numpy as np
import torch

from llm_gym.core import Episode, Trajectory, group
from llm_gym.env import Reply, TextEnv
from llm_gym.errors import LLMGymError
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.learner.weights import STATE, read_tensors
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.loops.sft import SFTConfig, sft
from llm_gym.harness.loops.starting import load_group_learner
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.runs.run_folder import RunFolder


class Count(TextEnv):
    """Rewards digits, turn by turn: any model earns a little, so most groups have spread. It has rows."""

    num_tasks = 7

    def __init__(self, *, turns: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.turns = turns

    def open(self) -> Any:
        self.left = self.turns
        return [{"role": "user", "content": f"Count to {self.draw_task(self.num_tasks)} and {self.turns}."}]

    def reply(self, text: str) -> Reply:
        self.left -= 1
        parts = {"digits": sum(c.isdigit() for c in text) / (1 + len(text)), "short": float(len(text) < 12)}
        return Reply(reward=parts, done=self.left == 0, messages=[{"role": "user", "content": "And on?"}])


COUNT = "random/Count-v0"
if COUNT not in gymnasium.registry:
    gymnasium.register(COUNT, entry_point=Count)


INIT = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, vocab_size: 4096}"
)
COMMON: dict[str, Sequence[Any]] = {
    "optimizer.name": ("adamw", "adamw", "adamw8bit", "adafactor", "muon"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "optimizer.warmup_steps": (0, 1, 9),
    "optimizer.lr": (0, 1e-6, 1e-3, 0.1),
    "optimizer.weight_decay": (0, 0.1),
    "optimizer.max_grad_norm": (0, 1e-3, 1),
    "optimizer.dtype": ("float32", "float32", "bfloat16"),
    "lora": ("{rank: 2}", "{rank: 3, kind: dora}", "{rank: 4, kind: rslora, layers: '0'}", "{rank: 2, base: nf4}"),
    "memory.checkpointing": (0, 1, 2),
    "memory.train_layers": ("head", "norms", "'1'", "'0,embeddings'"),
    "token_budget": (1, 40, 16384, "auto"),
    "checkpoint.every": (0, 1, 2),
    "checkpoint.keep": (1, 3),
    "seed": (0, 5, 2**31),
}
"""Setting -> what it may be; strings are YAML. A value may stand twice: it is then drawn more often."""
PLAYED: dict[str, Sequence[Any]] = {
    "env": ("Arithmetic-v0", "GuessNumber-v0"),
    "envs": (f"[{{env: {COUNT}, weight: 2}}, {{env: Arithmetic-v0, curriculum: {{name: uniform}}}}]",),
    "env_args": ("{turns: 2}", "{turns: 3}", "{max_tokens: 3}", "{system_prompt: Be brief.}", "{max_context: 90}"),
    "curriculum": ("{name: epochs}", "{name: difficulty, pass_reward: 0.1}"),
    "filters": ("{spread: 0}", "{min_length: 2}", "{distinct: 2, sound: 1}", "{max_reward: -1}"),
    "oversample": ("{max_factor: 2}", "{max_factor: 3}"),
    "prompts_per_step": (1, 2, 3),
    "group_size": (2, 2, 3, 1),
    "minibatches": (1, 2),
    "epochs": (1, 2),
    "truncated": ("train", "mask"),
    "sampling.temperature": (0.7, 1.0, 1.5),
    "sampling.max_tokens": (1, 4, 9),
    "sampling.stop_token_ids": ("[]", "[10]"),
    "policy.max_rows": (1, 3, 256),
    "loss.normaliser": ("token_global", "sequence", "constant"),
    "eval.episodes": (0, 0, 1, 3),
    "eval.k": (1, 2),
    "eval.every": (0, 1),
    "checkpoint.keep_best": ("true",),
}
TRAINED: dict[str, Sequence[Any]] = {
    "preset": ("grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "rloo", "reinforce_pp", "gdpo"),
    "advantage": ("group_norm", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "turn_norm", "none"),
    "overlong": (0, 0.5, 1),
    "loss.kl": ("{kl: k1, kl_weight: 0.1, kl_in: reward}", "{kl: k2, kl_weight: 0.1}", "{kl: k3, kl_weight: 1}"),
    "loss.entropy_weight": (0, 0.01),
    "loss.correction": ("{name: tis}", "{name: mis, level: sequence}", "{name: icepop, high: 5}"),
}
DISTILLED: dict[str, Sequence[Any]] = {
    "distill.kl": ("sampled", "top_k", "full"),
    "distill.top_k": (1, 5),
}
FINE_TUNED: dict[str, Sequence[Any]] = {
    "examples_per_step": (1, 3, 8),
    "max_length": (40, 4096),
    "long": ("drop", "cut"),
    "split": ("train", "'train[:3]'"),
    "epochs": (0.5, 1),
    "eval.split": ("'train[3:]'",),
    "eval.every": (0, 1),
    "init": (INIT,),
    "save_dtype": ("float32", "bfloat16"),
}
TABLES = {
    "train": {**COMMON, **PLAYED, **TRAINED},
    "distill": {**COMMON, **PLAYED, **DISTILLED},
    "sft": {**COMMON, **FINE_TUNED},
}
SHARE = 0.25
"""How likely a setting is to be in a configuration."""


@dataclass(frozen=True)
class Drawn:
    """One configuration."""

    kind: str
    """A key of `TABLES`."""
    sets: tuple[str, ...]
    """As `--set` takes them."""
    died_at: int
    """The row after which the run is killed."""

    def __str__(self) -> str:
        return f"{self.kind} (killed after row {self.died_at}): " + " ".join(f"--set '{text}'" for text in self.sets)


def draw(seed: int) -> Drawn:
    """The configuration of a seed."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(TABLES), p=[0.6, 0.2, 0.2]))
    sets = [f"{name}={rng.choice(np.array(of, object))}" for name, of in TABLES[kind].items() if rng.random() < SHARE]
    sets = [text.replace("loss.kl=", "loss=") for text in sets]
    if any(text.startswith("oversample") for text in sets):
        sets.append("filters.spread=0")  # without any, nothing is replaced, which is refused
    sets.sort(key=lambda text: not text.startswith("loss={"))  # a section first, then what is over it
    base = {"steps": 2} if kind == "sft" else {"steps": 2, "prompts_per_step": 2, "group_size": 2, "eval.episodes": 0}
    base |= {} if kind == "sft" else {"env": COUNT, "sampling.max_tokens": 6}
    return Drawn(kind, (*(f"{k}={v}" for k, v in base.items()), *sets), int(rng.integers(1, 4)))


def settings(drawn: Drawn) -> Any:
    """What it says.

    Raises:
        LLMGymError: it cannot be.
    """
    if drawn.kind == "sft":
        return load(SFTConfig, None, drawn.sets, dataset=str(things() / "chats.jsonl"))
    teacher = [f"distill.teacher={things() / 'teacher'}"] if drawn.kind == "distill" else []
    # An absolute rate is no matter here; what nobody chose is chosen by the model.
    return load(TrainConfig, None, [*drawn.sets, *teacher])


@cache
def things() -> Path:
    """A folder with chats and with a teacher that is not the student."""
    folder = Path(mkdtemp(prefix="llmgym-random-"))
    chats = [
        [{"role": "user", "content": f"{i} + {i}"}, {"role": "assistant", "content": f"{2 * i}. " * (1 + 5 * (i % 3))}]
        for i in range(6)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    model = load_model(None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    from llm_gym.harness.learner.weights import export

    export(model, None, folder / "teacher")
    return folder


class Killed(BaseException):
    """A kill, inside this process."""


class KillAfter(Observer):
    """Kills the run after so many rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def on_row(self, row: Mapping[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def check(drawn: Drawn, folder: Path, *, looks: Sequence[str] = ("budget", "rewards")) -> str:
    """Runs a configuration and looks at all that must hold; returns `ran`, or why it was refused.

    `looks`: which of the last two properties to look at; each starts one more learner.

    Raises:
        AssertionError: something does not hold.
        Exception: what must never be raised.
    """
    try:
        config = settings(drawn)
        if drawn.kind == "sft":
            _check_sft(config, folder)
        else:
            _check_played(config, drawn, folder, looks)
    except LLMGymError as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def _check_sft(config: SFTConfig, folder: Path) -> None:
    whole, cut = (dataclasses.replace(config, out=str(folder / name)) for name in ("whole", "cut"))
    sft(whole, progress=False)
    steps = len([row for row in RunFolder(folder / "whole").metrics() if row["step"]])
    if steps > 1 and config.epochs is None:  # a shorter run is a killed one, but for its schedule
        log = RunFolder.log

        def logged(run: RunFolder, row: Mapping[str, Any]) -> None:
            log(run, row)
            if row["step"] == 1:
                raise Killed

        try:
            RunFolder.log = logged  # type: ignore[method-assign]
            sft(cut, progress=False)
        except Killed:
            pass
        finally:
            RunFolder.log = log  # type: ignore[method-assign]
    sft(cut, progress=False, resume=True)
    same_runs(folder / "whole", folder / "cut")


def _check_played(config: TrainConfig, drawn: Drawn, folder: Path, looks: Sequence[str]) -> None:
    Trainer(config, out=folder / "whole").train()
    dying = Trainer(config, out=folder / "cut", observer=KillAfter(drawn.died_at))
    try:
        dying.train()
    except Killed:
        Trainer(config, out=folder / "cut", resume=True).train()
    same_runs(folder / "whole", folder / "cut")
    (*_, last) = replay(folder / "whole", config.steps)
    assert not last.differences, f"replay differs: {last.differences[:3]}"
    if "budget" in looks:
        _check_budget(folder / "whole")
    if "rewards" in looks:
        _check_equal_rewards(config, folder)


def same_runs(one: Path, other: Path) -> None:
    """Every row, all episodes, and the last weights and optimizer state."""
    rows = [[_stable(row) for row in RunFolder(run).metrics()] for run in (one, other)]
    assert rows[0] == rows[1], f"rows differ: {_first_difference(*rows)}"
    ends = [RunFolder(run).checkpoints()[-1] for run in (one, other)]
    assert ends[0].name == ends[1].name
    tensors = [{**read_tensors(end), **_flat(torch.load(end / STATE, weights_only=True))} for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        assert torch.equal(tensors[0][name], tensors[1][name]), f"{name} differs"


def _check_budget(run: Path) -> None:
    """The first step of a replay, with micro-batches of one sequence; in float32: a half's rounding hides much."""
    exact = ["optimizer.dtype=float32"]
    whole, alone = (next(iter(replay(run, 1, sets=sets))).learned for sets in (exact, [*exact, "token_budget=1"]))
    for name in ("policy/grad_norm", "policy/loss"):
        a, b = whole[name], alone[name]
        assert np.isclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True), (
            f"{name} is {a} with a budget of {load(TrainConfig, run / 'config.yaml').token_budget}, {b} with 1"
        )


def _check_equal_rewards(config: TrainConfig, folder: Path) -> None:
    if config.distill is not None or config.advantage == "none" or config.overlong or config.loss.needs_every_sequence:
        return  # something else moves weights
    learning = load_group_learner(config)
    episodes = [
        dataclasses.replace(e, rewards=dict.fromkeys(e.rewards, 1.0), trajectories=_paying(e))
        for e in RunFolder(folder / "whole").read_episodes("step_000001")
        if not e.stop_reason.failed
    ]
    before = {name: tensor.clone() for name, tensor in learning.model.state_dict().items()}
    turns = {len(e.turns) for e in episodes}
    if episodes and len(episodes) % config.group_size == 0 and (config.advantage != "turn_norm" or len(turns) == 1):
        assert len(group(episodes, config.group_size)) >= 1
        learning.learn(group(episodes, config.group_size), 0)
    for name, tensor in learning.model.state_dict().items():
        assert torch.equal(before[name], tensor), f"{name} moved although all rewards are equal"


def _paying(episode: Episode) -> tuple[Trajectory, ...]:
    """Its trajectories with 1 for the first turn: a return of 1, however many turns."""
    return tuple(
        dataclasses.replace(t, spans=tuple(dataclasses.replace(s, reward=float(s.turn == 0)) for s in t.spans))
        for t in episode.trajectories
    )


def _stable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "tokens_per_second/"))}


def _first_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} rows"
    pairs = (
        (a["step"], name, a.get(name), b.get(name))
        for a, b in zip(one, other, strict=True)
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    )
    return "step {}: {} is {} and {}".format(*next(pairs))


def _flat(value: Any, name: str = "state") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return {k: t for key, item in items for k, t in _flat(item, f"{name}.{key}").items()}
