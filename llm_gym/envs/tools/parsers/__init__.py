"""How models write tool calls, and how they are read."""
