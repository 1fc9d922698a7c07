"""What decides a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import yaml

from llm_gym.errors import ConfigError
from llm_gym.harness.bounds import Within
from llm_gym.harness.config import CheckpointConfig
from llm_gym.harness.distributed.world import ParallelConfig
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.devices import check_device_name
from llm_gym.harness.model.loading import LoraConfig
from llm_gym.harness.model.memory import MemoryConfig
from llm_gym.harness.rates import Rates, hidden_size, rates
from llm_gym.harness.runs.lineage import model_path
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.settings import checked
from llm_gym.templates import read_template


@checked("eval")
@dataclass(frozen=True)
class SFTEvalConfig:
    """Loss on chats that are not trained on; off unless `dataset` or `split` is given."""

    dataset: str | None = None
    """A hub id or a file; None: the run's own data set, of which `split` names another part."""
    split: str | None = None
    """Such as `test`, or `train[95%:]` beside a `split` of `train[:95%]`; None: `train`."""
    every: Annotated[int, Within("[0, inf)")] = 0
    """Also after every so many steps; 0: only before the first and after the last."""


@checked()
@dataclass(frozen=True)
class SFTConfig:
    """Everything that decides a fine-tuning run."""

    dataset: str | None = None
    """Hub id, or a .jsonl, .json, .parquet or .csv file of chats; None: examples are passed in Python."""
    split: str = "train"
    """Split of a hub data set, slices included (`train[:95%]`); for a file only the slice counts."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What a row holds (`messages`, or `prompt` and `completion`; `tools`) -> its column, where the name is unusual."""
    system_prompt: str | None = None
    """Put before chats that have no system message."""
    model: str | None = None
    """Folder, hub id or run folder of the model; None: the embedded one."""
    init: Mapping[str, Any] = field(default_factory=dict)
    """A Hugging Face config (`model_type` and its fields) to start from random weights; empty: load the weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None: the model's."""
    chat_template: str | None = None
    """For a model without chat template (most base models), or over its own: `plain`, `chatml` or a .jinja file, whose
    text then stands here. It is saved with the model."""
    out: str | None = None
    """Run folder: config.yaml, metrics.jsonl, checkpoints and, at the end, the model in model/; None: write nothing."""
    steps: Annotated[int, Within("[1, inf)")] = 200
    """Optimizer steps."""
    epochs: Annotated[float | None, Within("(0, inf)")] = None
    """Passes over the data, instead of `steps`."""
    examples_per_step: Annotated[int, Within("[1, inf)")] = 64
    """Chats per optimizer step; the data is shuffled anew in every pass."""
    max_length: Annotated[int, Within("[1, inf)")] = 4096
    """Most tokens of a chat."""
    long: Literal["drop", "cut"] = "drop"
    """Longer chats are dropped, or cut at the end; both are counted and said."""
    seed: Annotated[int, Within("[0, 18446744073709551616)")] = 0
    """Decides the initial weights and the order of the data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the weights move."""
    lora: LoraConfig | None = None
    """Low-rank adapters; None trains every weight."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What memory is spent on."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several processes share the work (`llmgym sft --nproc`)."""
    token_budget: Annotated[int | Literal["auto"], Within("[1, inf)")] = 16384
    """Most tokens in one micro-batch; the gradient does not depend on it. `auto`: measured when the run starts."""
    eval: SFTEvalConfig = field(default_factory=SFTEvalConfig)
    """Loss on chats that are not trained on."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=100, keep=1))
    """When the run is saved, to go on from."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights written at the end."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""

    def __post_init__(self) -> None:
        check_device_name(self.device)
        if self.init and self.model:
            raise ConfigError(f"init: starts from random weights, but model={self.model!r} was given; set one of them.")

    def rates(self, model: Any = None) -> Rates:
        """The learning rates of the run, and why; `model` if it is given in Python."""
        loop, path = ("scratch" if self.init else "sft"), model_path(self.model)
        width = hidden_size(self.init or path) if model is None else model.config.get_text_config().hidden_size
        return rates(loop, self.optimizer, self.lora, model=path, width=width)

    def resolved(self, model: Any = None) -> SFTConfig:
        """With the learning rates settled, and a run folder as model by what it trained."""
        return replace(
            self,
            model=model_path(self.model),
            chat_template=read_template(self.chat_template),
            optimizer=self.rates(model).fill(self.optimizer),
        )

    def as_begun(self) -> SFTConfig:
        """Of a run that goes on, with the learning rates that it began with where they are left open.

        Older versions left them open in config.yaml too, and took others than `rates` would.
        """
        file = RunFolder(self.out).config_file if self.out is not None else None
        if self.optimizer.lr is not None or file is None or not file.is_file():
            return self
        begun = (yaml.safe_load(file.read_text("utf-8")) or {}).get("optimizer") or {}
        old = 2e-3 if self.init else 1e-4 if self.lora else 1e-5
        muon_lr = self.optimizer.muon_lr if begun.get("muon_lr") is None else begun["muon_lr"]
        lr = old if begun.get("lr") is None else begun["lr"]
        return replace(self, optimizer=replace(self.optimizer, lr=lr, muon_lr=muon_lr))
