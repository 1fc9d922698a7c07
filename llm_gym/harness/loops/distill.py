"""What learns in on-policy distillation: a loss that a teacher judges (https://arxiv.org/abs/2306.13649)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from llm_gym.core import Group
from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.config import DistillConfig, TrainConfig
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.loops.group_learner import GroupLearner
from llm_gym.harness.loops.teacher import (
    LocalTeacher,
    ServedTeacher,
    Teacher,
    UniformTeacher,
    check_tokenizers,
)
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.model.divergence import Head, reverse_kl, top_k_kl
from llm_gym.harness.model.heads import token_logprobs
from llm_gym.harness.model.loading import config_of
from llm_gym.harness.runs.lineage import model_path
from llm_gym.harness.types import Batch, MicroBatch, TokenStreams
from llm_gym.policies.vllm_server.addresses import addresses
from llm_gym.tokenizer import load_tokenizer

NO_TEACHER = (
    "distill.teacher: got nothing, want a folder, a hub id or addresses of vLLM servers (--teacher); without "
    "one it would be `llmgym train`."
)


class DistillGroupLearner(GroupLearner):
    """Trains a student on its own samples towards a teacher; what a token earns is not the episode's reward."""

    teacher: Teacher

    def make_learner(self) -> Learner:
        """A learner that asks the teacher."""
        config, settings = self.config, self.config.distill
        assert settings is not None
        self.teacher = make_teacher(settings, config)
        return DistillLearner(
            self.model,
            config.optimizer,
            config.loss,
            total_steps=config.updates,
            world=self.world,
            teacher=self.teacher,
            settings=settings,
        )

    def batches(self, groups: Sequence[Group]) -> list[Batch]:
        """The groups, every token of them to be judged, dealt into the run's `minibatches`."""
        n = self.config.minibatches
        return [self.pack(groups[i::n]) for i in range(n)]

    def close(self) -> None:
        """The teacher goes."""
        self.teacher.close()


def group_learner_of(config: TrainConfig) -> type[GroupLearner]:
    """What learns in a run of this configuration."""
    return GroupLearner if config.distill is None else DistillGroupLearner


class DistillLearner(Learner):
    """A learner whose loss is the divergence from a teacher.

    Args:
        model: the student.
        optimizer: as the learner's.
        loss: as the learner's; `top_k` and `full` read its normaliser only.
        total_steps: as the learner's.
        teacher: who judges.
        settings: by which divergence.
    """

    def __init__(self, *args: Any, teacher: Teacher, settings: DistillConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.distill = teacher, settings

    def dry_run(self, batch: MicroBatch) -> None:
        """As the learner's; servers are not asked about tokens that mean nothing."""
        teacher = self.teacher
        self.teacher = teacher if isinstance(teacher, LocalTeacher) else UniformTeacher()
        try:
            super().dry_run(batch)
        finally:
            self.teacher = teacher

    def backward(self, batch: MicroBatch, temperature: float) -> dict[str, float]:
        """As the learner's, towards the teacher."""
        if self.distill.kl == "sampled":
            judged = batch.having(teacher=self.teacher.logprobs(batch))
            return {**super().backward(judged, temperature), "distill/kl": -float(self._credit(judged.streams).sum())}

        def divergence(**hidden: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
            student = Head(*(hidden[name] for name in Head._fields))
            kl = self._divergence(student, batch)
            return (batch.streams["weight"] * kl).sum(), kl.detach().sum(), _seen(student, batch)

        loss, kl, seen = self._through(self.backbone, batch, temperature, divergence)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"policy/loss": float(loss.detach()), "distill/kl": float(kl), **seen}

    def _credit(self, known: TokenStreams) -> torch.Tensor:
        """How much likelier the teacher finds each token than the sampler did, [M]."""
        return known["teacher"] - known["old_logprobs"]

    def _divergence(self, student: Head, batch: MicroBatch) -> torch.Tensor:
        if self.distill.kl == "top_k":
            return top_k_kl(student, *self.teacher.top(batch, self.distill.top_k))
        assert isinstance(self.teacher, LocalTeacher)
        return reverse_kl(student, self.teacher.head(batch))


def make_teacher(settings: DistillConfig, config: TrainConfig) -> Teacher:
    """The teacher of a run.

    Raises:
        ConfigError: it cannot be loaded, or its servers cannot score.
    """
    if settings.served:
        k = settings.top_k if settings.kl == "top_k" else 0
        return ServedTeacher(settings.teacher, load_tokenizer(config.model), k=k)
    device = device_of(config.device)
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    return LocalTeacher(settings.teacher, device=device, dtype=dtype, temperature=config.sampling.temperature)


def check_distill(config: TrainConfig) -> DistillConfig:
    """Looks at all that distillation is told, before a model is loaded; its settings, a run's model in the run's place.

    Raises:
        SettingError: no teacher, one of another tokenizer, or settings that would be ignored.
    """
    settings = config.distill
    if settings is None or not settings.teacher:
        raise ConfigError(NO_TEACHER)
    plain = TrainConfig()
    for name in ("advantage", "overlong"):
        if getattr(config, name) != getattr(plain, name):
            raise ConfigError(
                f"{name}: got {getattr(config, name)!r}, but in distillation the teacher judges; leave it."
            )
    kept = {name: getattr(config.loss, name) for name in ("normaliser", "constant_length")}
    if settings.kl != "sampled" and config.loss != LossConfig(**kept):
        raise ConfigError(
            f"loss: with distill.kl={settings.kl!r} only the normaliser can be chosen, got {config.loss}."
        )
    if settings.served:
        addresses(settings.teacher, "distill.teacher")
        if config.sampling.temperature != 1.0:
            raise ConfigError(
                f"sampling.temperature: got {config.sampling.temperature}, but servers score at 1 only; pass 1, or a "
                "local teacher."
            )
        return settings
    settings = replace(settings, teacher=str(model_path(settings.teacher, "distill.teacher")))
    vocabulary = config_of(settings.teacher, "distill.teacher").get_text_config().vocab_size
    check_tokenizers(model_path(config.model), settings.teacher)
    if settings.kl == "top_k" and settings.top_k > vocabulary:
        raise ConfigError(f"distill.top_k: got {settings.top_k}, but the teacher knows {vocabulary} tokens.")
    return settings


@torch.no_grad()
def _seen(student: Head, batch: MicroBatch) -> dict[str, float]:
    """The metrics that every learner reports, as sums over tokens."""
    logprobs, entropy = token_logprobs(targets=batch.streams["target"], **student._asdict())
    apart = logprobs - batch.streams["old_logprobs"]
    return {
        "policy/entropy": float(entropy.sum()),
        "policy/ratio_mean": float(apart.exp().sum()),
        "sampler/logprob_gap_mean": float(apart.abs().sum()),
        "sampler/logprob_gap_max": float(apart.abs().max()),
    }
