"""Every decision of a training run; settings of one part stand beside that part, and here together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from llm_gym.core import Sampling
from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.algorithms.presets import PRESETS
from llm_gym.harness.bounds import Within
from llm_gym.harness.data.agents import AgentConfig
from llm_gym.harness.data.curriculum import CurriculumConfig
from llm_gym.harness.data.mixture import EnvConfig
from llm_gym.harness.data.selection import OversampleConfig
from llm_gym.harness.data.stream import StreamConfig
from llm_gym.harness.distributed.cluster import ClusterConfig
from llm_gym.harness.distributed.world import ParallelConfig
from llm_gym.harness.evaluation.evaluator import EvalConfig
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.model.devices import check_device_name
from llm_gym.harness.model.loading import LoraConfig
from llm_gym.harness.model.memory import MemoryConfig
from llm_gym.harness.rates import Rates, hidden_size, rates
from llm_gym.harness.runs.lineage import model_path
from llm_gym.harness.runs.loggers import LogConfig
from llm_gym.harness.settings import SECRET, checked
from llm_gym.templates import read_template


@checked("checkpoint")
@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: Annotated[int, Within("[0, inf)")] = 20
    """Steps between checkpoints; the last step is always saved, and with 0 no other."""
    keep: Annotated[int, Within("[0, inf)")] = 2
    """Newest checkpoints kept; 0: all of them."""
    keep_best: bool = False
    """Whether to save, and keep as `checkpoints/best`, the step with the best `eval/sampled_reward` (of a mixture,
    `eval/mixture_reward`)."""


@checked("policy")
@dataclass(frozen=True)
class PolicyConfig:
    """The engine that samples."""

    engine: str = "auto"
    """`transformers` (built in), `vllm` (in this process), `server` (vLLM servers) or `sglang` (SGLang servers);
    `auto`: `server` if there are `servers`, else the built-in one."""
    sync: str = "auto"
    """How new weights reach the engine: a row of `transports.MODES`, or a `Mode` at `package.module:NAME`; `auto`
    measures where there is a choice."""
    canary_limit: Annotated[float | None, Within("(0, inf]")] = None
    """Largest difference (nats) between engine and learner on a token before a run is stopped; None: 1e-3 in
    float32, else by the learner's own rounding (docs/sync.md)."""
    sleep: bool = False
    """Whether vLLM frees its memory while the learner trains (CUDA only)."""
    max_rows: Annotated[int, Within("[1, inf)")] = 256
    """Sequences that the built-in engine decodes at once."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the vLLM engine, passed through (`gpu_memory_utilization`, `max_model_len` ...)."""
    servers: tuple[str, ...] = ()
    """Addresses of vLLM servers, such as `http://127.0.0.1:8000`; `llmgym serve` starts one. Or of SGLang
    servers, with that engine."""
    server: Mapping[str, Any] = field(default_factory=dict, metadata={SECRET: ("token",)})
    """How servers are used (`token`, `folder` for weights on a shared disk, `retry_seconds`, `max_context` ...)."""


@checked("distill")
@dataclass(frozen=True)
class DistillConfig:
    """On-policy distillation: the student samples in the environment, the teacher judges every token.

    In place of the environment's reward; advantages and the loss's clipping do not apply to `top_k` and `full`.
    """

    teacher: str = ""
    """Folder, hub id or run folder of the teacher; or addresses of vLLM servers (`http://...`, separated by commas)."""
    kl: Literal["sampled", "top_k", "full"] = "sampled"
    """`full`: the exact reverse KL of every position (a local teacher). `top_k`: over the teacher's likeliest tokens
    and all others as one. `sampled`: the policy gradient with advantage log q - log p of each sampled token."""
    top_k: Annotated[int, Within("[1, inf)")] = 16
    """Tokens of `top_k`; vLLM servers give 20 at most unless started with a larger `max_logprobs`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a local teacher's weights; `auto`: bfloat16 on CUDA."""

    def __post_init__(self) -> None:
        if self.served and self.kl == "full":
            raise ConfigError(
                "distill.kl: 'full' needs the teacher's whole distribution, which no server sends; "
                "pass top_k or sampled, or a local teacher."
            )

    @property
    def served(self) -> bool:
        """Whether the teacher is behind servers."""
        return self.teacher.startswith(("http://", "https://"))


@checked()
@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    """What `load` takes for `preset`."""

    env: str = "Arithmetic-v0"
    """Environment id; short ids mean `llm_gym/...`, `module:id` imports the module first."""
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    envs: tuple[EnvConfig, ...] = ()
    """Several environments with weights, in place of `env`; `env_args` are then for all of them."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """An agent of your own that plays the episodes, in place of the environment's turns."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Which rows of the data are played, and when."""
    filters: Mapping[str, Any] = field(default_factory=dict)
    """Which groups are trained on: a row of `filters.FILTERS` or "package.module:function" -> its limit."""
    oversample: OversampleConfig = field(default_factory=OversampleConfig)
    """How groups that do not pass the filters are replaced."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How far rollouts may be ahead of the learner; by default not at all."""
    model: str | None = None
    """Folder, hub id or run folder of the model; None: the embedded one."""
    chat_template: str | None = None
    """For a model without chat template (most base models), or over its own: `plain`, `chatml` or a .jinja file, whose
    text then stands here. It is saved with the model."""
    seed: Annotated[int, Within("[0, 18446744073709551616)")] = 0
    """Decides the tasks, the sampling and everything random."""
    steps: Annotated[int, Within("[1, inf)")] = 120
    """Rollouts, each followed by `minibatches` * `epochs` optimizer steps."""
    prompts_per_step: Annotated[int, Within("[1, inf)")] = 16
    """Tasks (groups) per step."""
    group_size: Annotated[int, Within("[1, inf)")] = 8
    """Episodes per task."""
    minibatches: Annotated[int, Within("[1, inf)")] = 1
    """Batches that a step's tasks are dealt into, with an optimizer step each."""
    epochs: Annotated[int, Within("[1, inf)")] = 1
    """Passes over a step's episodes; old log-probabilities stay as they were sampled."""
    advantage: str = "group_norm"
    """A row of `advantages.ADVANTAGES`, or "package.module:function"."""
    truncated: Literal["train", "mask"] = "train"
    """Episodes cut by length or time: `train` on them, or `mask` them out of the loss (they stay in baselines)."""
    overlong: Annotated[float, Within("[0, 1]")] = 0.0
    """Share of the completion limit over which a penalty grows from 0 to -1 (DAPO: 0.2); 0: none."""
    sampling: Sampling = field(default_factory=Sampling)
    """How training episodes are sampled."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    distill: DistillConfig | None = None
    """A teacher that judges in place of rewards (`llmgym distill`); None: reinforcement learning."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(schedule="linear", warmup_steps=5))
    """How the weights move."""
    lora: LoraConfig | None = None
    """Low-rank adapters; None trains every weight."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What memory is spent on."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The engine that samples."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Engines, players and learners in processes that Ray places, on one machine or on several (docs/cluster.md)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several processes share the work (`llmgym train --nproc`)."""
    token_budget: Annotated[int | Literal["auto"], Within("[1, inf)")] = 16384
    """Most tokens in one micro-batch; the gradient does not depend on it. `auto`: measured when the run starts."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    threads: Annotated[int | None, Within("[1, 1024]")] = None
    """CPU threads of torch; None: torch's own choice, but one for a model as small as the embedded one."""
    time_limit: Annotated[float | None, Within("(0, inf)")] = None
    """Seconds an episode may take."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on unseen problems."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    log: LogConfig = field(default_factory=LogConfig)
    """Where rows of metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.minibatches > self.prompts_per_step:
            raise ConfigError(f"minibatches: got {self.minibatches}, want at most the {self.prompts_per_step} prompts.")
        check_device_name(self.device)
        if not self.sampling.full_support:
            raise ConfigError(
                "sampling: training needs the full distribution (temperature > 0, top_k=0, top_p=1, min_p=0), "
                f"or the log-probabilities would be of another one; got {self.sampling}."
            )
        if (self.loss.kl == "none") != (self.loss.kl_weight == 0):
            raise ConfigError(f"loss.kl_weight: got {self.loss.kl_weight} with kl={self.loss.kl!r}; set both or none.")

    @property
    def title(self) -> str:
        """What is played, in a few words."""
        return " + ".join(entry.name or entry.env for entry in self.envs) or self.env

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.minibatches * self.epochs

    @property
    def rates(self) -> Rates:
        """The learning rates of the run, and why; only the model's config is read."""
        loop, model = "train" if self.distill is None else "distill", model_path(self.model)
        return rates(loop, self.optimizer, self.lora, model=model, width=hidden_size(model))

    def resolved(self) -> TrainConfig:
        """With every None filled in that depends on other settings, a run folder as model by what it trained, and a
        template's file by its text.

        Raises:
            CheckpointError: that run has saved nothing yet.
            ConfigError: no such template.
        """
        model = model_path(self.model)
        template, optimizer = read_template(self.chat_template), self.rates.fill(self.optimizer)
        return dataclasses.replace(self, model=model, chat_template=template, optimizer=optimizer)
