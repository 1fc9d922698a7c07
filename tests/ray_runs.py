"""Runs on a Ray cluster: their processes, and everything that was sampled in them."""

from __future__ import annotations

from pathlib import Path

import psutil

from llm_gym.harness.runs.run_folder import RunFolder


def pids(title: str) -> list[int]:
    """Of actors' processes, by what Ray calls them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or [""]
        if line[0].startswith(f"ray::{title}"):
            found.append(process.pid)
    return sorted(found)


def sampled(run: Path) -> list[list[int]]:
    """Everything that was sampled in a run, step by step."""
    folder = RunFolder(run)
    return [
        [int(t) for e in folder.read_episodes(f"step_{step:06d}") for turn in e.turns for t in turn.completion.tokens]
        for step in range(1, len(folder.metrics()))
    ]
