"""The `llmgym` command: one click command per file, imported when it is called."""

from llm_gym.cli.group import main

__all__ = ["main"]
