"""The trainer: configuration, gradient, loop."""

from llm_gym.harness.config import TrainConfig, load
from llm_gym.harness.trainer import Observer, Trainer

__all__ = ["Observer", "TrainConfig", "Trainer", "load"]
