"""Tools for models: calls as text, results as tokens, and the environments that use them."""

from llm_gym.envs.tools.env import ToolEnv
from llm_gym.envs.tools.schema import Tool
from llm_gym.errors import ToolError, ToolFailure

__all__ = ["Tool", "ToolEnv", "ToolError", "ToolFailure"]
