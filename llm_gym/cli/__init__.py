"""The `llmgym` command."""
