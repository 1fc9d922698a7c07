"""What a model folder can do, on problems that its training never saw.

    python examples/embedded_model/evaluate.py DIR [--split test]

It is played by the built-in engine on the weights as written (rounded to bfloat16), and graded as the environment
grades.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from corpus import CALCULATOR, PYTHON, Tool, draw, large_problem, two_digit_sum

from llm_gym import Sampling
from llm_gym.chat import Chat, load_chat
from llm_gym.core import Ids, Messages
from llm_gym.envs.arithmetic import Problem
from llm_gym.envs.grading import verify
from llm_gym.policies import Policy, make_policy

GREEDY, SAMPLED = Sampling(temperature=0.0, max_tokens=48), Sampling(max_tokens=48)


def evaluate(folder: Path, *, split: str = "test", count: int = 512, seed: int = 0) -> dict[str, float]:
    """Fractions over `count` problems of `split`, by name."""
    policy = make_policy(folder, engine="transformers")
    rng = random.Random(seed)
    sums = [draw(rng, two_digit_sum, split) for _ in range(count)]
    large = [draw(rng, large_problem, split) for _ in range(count)]
    chat = load_chat(str(folder))
    report = {}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        replies = _replies(policy, chat, [chat.open(_asked(p)) for p in sums], sampling)
        report[f"addition/{name}_accuracy"] = _accuracy(sums, replies)
    for tool in (PYTHON, CALCULATOR):
        report |= {f"{tool.name}/{name}": v for name, v in _tool_skills(policy, folder, tool, large).items()}
    policy.close()
    return report


def _tool_skills(policy: Policy, folder: Path, tool: Tool, problems: Sequence[Problem]) -> dict[str, float]:
    """How often it calls, whether a call copies its operands, and whether the result becomes the answer."""
    chat = load_chat(str(folder), [tool.schema])
    contexts = [chat.open(_asked(p)) for p in problems]
    wanted = [tool.call(f"{p.a}{p.op}{p.b}") for p in problems]
    begun = chat.encode_reply("<tool_call>")[:-1]
    calls = _replies(policy, chat, [np.concatenate([c, begun]) for c in contexts], GREEDY)
    said = [chat.encode_reply(call) for call in wanted]
    results = [[{"role": "tool", "content": str(p.answer)}] for p in problems]
    answered = [np.concatenate([c, s, chat.extend(s, r)]) for c, s, r in zip(contexts, said, results, strict=True)]
    answers = _replies(policy, chat, answered, GREEDY)
    free = {n: _replies(policy, chat, contexts, s) for n, s in (("greedy", GREEDY), ("sampled", SAMPLED))}
    called = {n: [r for r in replies if r.startswith("<tool_call>")] for n, replies in free.items()}
    return {
        "greedy_call_rate": round(len(called["greedy"]) / len(problems), 4),
        "sampled_call_rate": round(len(called["sampled"]) / len(problems), 4),
        "sampled_well_formed_rate": _mean([_well_formed(r, tool) for r in called["sampled"]] or [0.0]),
        "sampled_exact_call_rate": _mean([r == w for r, w in zip(free["sampled"], wanted, strict=True)]),
        "sampled_guess_accuracy": _accuracy(problems, free["sampled"]),
        "exact_when_calling": _mean(["<tool_call>" + c == w for c, w in zip(calls, wanted, strict=True)]),
        "exact_answer_from_result": _mean([a == f"Answer: {p.answer}" for a, p in zip(answers, problems, strict=True)]),
    }


def _well_formed(reply: str, tool: Tool) -> bool:
    """Whether a reply is one call of this tool with its one argument, whatever that says."""
    call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", reply)
    try:
        content = json.loads(call[1]) if call else None
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("name") == tool.name and [*content["arguments"]] == [tool.argument]


def _asked(problem: Problem) -> Messages:
    return [{"role": "user", "content": problem.question}]


def _replies(policy: Policy, chat: Chat, contexts: Sequence[Ids], sampling: Sampling) -> list[str]:
    completions = policy.generate(contexts, sampling, seeds=range(len(contexts)))
    return [chat.text(c.tokens) if c.finish_reason == "stop" else "" for c in completions]


def _accuracy(problems: Sequence[Problem], replies: Sequence[str]) -> float:
    graded = zip(problems, replies, strict=True)
    return _mean([0.0 if "<tool_call>" in r else verify(p.answer, r, kind="number").score for p, r in graded])


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--problems", type=int, default=512, help="problems of each kind")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.folder, split=args.split, count=args.problems), indent=2))


if __name__ == "__main__":
    main()
