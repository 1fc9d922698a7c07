"""Answer extraction and equivalence: `verify(gold, text) -> Grade`."""

from llm_gym.envs.grading.verify import Grade, verify

__all__ = ["Grade", "verify"]
