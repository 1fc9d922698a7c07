"""Answer extraction and equivalence: `verify(gold, text) -> Grade`."""

from llm_gym.envs.grading.verify import Grade, verify, verify_async, verify_many

__all__ = ["Grade", "verify", "verify_async", "verify_many"]
