"""Does an agent learn as well as the environment's own turns? The same tasks, played by each, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/agents.py [--seeds 0 1 2] [--steps 120] [--tool-steps 60]

`sums` is Arithmetic-v0, `tools` PythonTool-v0 with an agent that shows the model the same tool and runs its calls
itself. Prints the mean of `reward/correct` over the last ten steps, and the seconds of a run; the exit code is 1 if an
agent's mean is more than `MOST` below.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llm_gym.envs.tools.python_tool import SCHEMA
from llm_gym.envs.tools.sandbox import PythonSession
from llm_gym.harness import TrainConfig, Trainer, load

MOST, LAST, CALLS = 0.03, 10, 8
sys.modules.setdefault("agents", sys.modules[__name__])


async def sums(task: dict[str, Any], endpoint: Any) -> None:
    """Asks once; the environment scores the reply."""
    await endpoint.client().chat.completions.create(model="m", messages=task["messages"])


async def tools(task: dict[str, Any], endpoint: Any) -> None:
    """Runs what the model calls until it calls no more; the environment scores the last reply."""
    client, chat = endpoint.client(), list(task["messages"])
    session = await asyncio.to_thread(PythonSession)
    try:
        for _ in range(CALLS):
            answer = await client.chat.completions.create(model="m", messages=chat, tools=[SCHEMA])
            message = answer.choices[0].message
            chat.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or ():
                code = json.loads(call.function.arguments).get("code", "")
                result = await asyncio.to_thread(session.run, str(code), 10.0)
                text = result.output.rstrip("\n") or "(no output)"
                chat.append({"role": "tool", "tool_call_id": call.id, "content": text})
            if not message.tool_calls:
                return
    finally:
        await asyncio.to_thread(session.close)


TASKS = {"sums": "Arithmetic-v0", "tools": "PythonTool-v0"}


def run(name: str, played: str, seed: int, steps: int, folder: Path) -> tuple[float, float]:
    """(mean of the last ten steps, seconds)."""
    sets = ["eval.episodes=0", *([f"agent.function=agents:{name}"] if played == "agent" else [])]
    began = time.monotonic()
    rows = Trainer(load(TrainConfig, sets=sets, env=TASKS[name], seed=seed, steps=steps), out=folder).train()
    last = [row["reward/correct"] for row in rows[-LAST:] if "reward/correct" in row]
    return float(np.mean(last)), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tool-steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/agents"))
    words = parser.parse_args()
    worse = False
    for name in TASKS:
        steps = words.steps if name == "sums" else words.tool_steps
        means = {}
        for played in ("environment", "agent"):
            found = [run(name, played, s, steps, words.runs / f"{name}-{played}-{s}") for s in words.seeds]
            means[played] = float(np.mean([mean for mean, _ in found]))
            each = ", ".join(f"{mean:.3f}" for mean, _ in found)
            seconds = float(np.median([seconds for _, seconds in found]))
            print(f"{name}, {played}: {means[played]:.3f} ({each}), {seconds:.0f} s", flush=True)
        worse |= means["agent"] < means["environment"] - MOST
    sys.exit(worse)


if __name__ == "__main__":
    main()
