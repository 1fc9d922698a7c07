"""A small MCP server, for the default task of `MCPTool-v0` and for tests: a calculator and notes.

python -m llm_gym.envs.tools.mcp.calculator_server
"""

from __future__ import annotations

import logging
from typing import Any

from llm_gym.envs.tools.calculator import evaluate

MOST_NOTES = 1000
MOST_CHARACTERS = 10_000


def build() -> Any:
    """A new server (a `fastmcp.FastMCP`) with notes of its own."""
    from fastmcp import FastMCP
    from fastmcp.exceptions import ToolError

    notes: dict[str, str] = {}

    def calculator(expression: str) -> str:
        """Evaluates an arithmetic expression."""
        try:
            return str(evaluate(expression))
        except ValueError as error:
            raise ToolError(str(error), log_level=logging.DEBUG) from error

    def write_note(title: str, text: str) -> str:
        """Keeps a note under a title, in place of an earlier one."""
        if len(notes) >= MOST_NOTES or len(title) + len(text) > MOST_CHARACTERS:
            raise ToolError(f"at most {MOST_NOTES} notes of {MOST_CHARACTERS} characters")
        notes[title] = text
        return f"Noted: {title}"

    def read_notes() -> dict[str, str]:
        """Gives back every note by its title."""
        return notes

    return FastMCP("llm_gym", tools=[calculator, write_note, read_notes])


if __name__ == "__main__":
    build().run(show_banner=False)
