"""Tools of MCP servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.envs.tools.mcp.env import MCPTool

__all__ = ["MCPTool"]
__getattr__ = names(__name__, {"env": ("MCPTool",)})
