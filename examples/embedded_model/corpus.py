"""The training text: worked additions, tool calls and copying, as chat messages.

How good the model is gets decided here, not by stopping early. It must learn the FORM of every skill well, and
apply it seldom: carries are forgotten in most additions, digits slip, and large problems are mostly guessed where
a tool would have given the answer. Reinforcement then has something to find.

Only problems of the training split are ever written: neither those of the test split (`Arithmetic-v0`'s own, a
hash of the problem) nor those of the validation split that the settings were chosen on.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm_gym.envs.arithmetic import Problem, split_of, worked

Example = dict[str, Any]
"""`{"messages": [...], "tools": [...]}`; tools only where there are any."""


@dataclass(frozen=True)
class Mix:
    """What a phase of training reads, and how faulty it is."""

    additions: float
    """Fraction of examples that are worked additions."""
    tools: float
    """Fraction that show a tool and a large problem; the rest is copying."""
    call_rate: float
    """How often a tool example calls the tool instead of guessing."""
    carry_rate: float = 1.0
    """How often a carry is written where there is one."""
    slip_rate: float = 0.0
    """How often one digit sum is off by one, and carried on consistently."""


@dataclass(frozen=True)
class Tool:
    """A function of one string argument that evaluates an expression."""

    name: str
    argument: str
    wrap: str = "{}"
    """The argument for an expression."""
    description: str = "Evaluates an arithmetic expression."

    @property
    def schema(self) -> dict[str, Any]:
        """The usual function schema."""
        parameters = {
            "type": "object",
            "properties": {self.argument: {"type": "string"}},
            "required": [self.argument],
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self, expression: str) -> str:
        """A call as the chat template spells it."""
        arguments = {self.argument: self.wrap.format(expression)}
        return "<tool_call>\n" + json.dumps({"name": self.name, "arguments": arguments}) + "\n</tool_call>"


PYTHON = Tool("python", "code", "print({})", "Runs Python code and returns what it prints.")
CALCULATOR = Tool("calculator", "expression")
OTHER_TOOLS = (
    Tool("math", "input"),
    Tool("eval", "query"),
    Tool("compute", "expr"),
    Tool("solver", "problem"),
    Tool("evaluate", "text"),
    Tool("run_python", "source", "print({})", "Runs Python code and returns what it prints."),
)
"""Names nobody asks for: they make the model read the schema instead of learning two names by heart."""
TOOLS = (PYTHON, CALCULATOR, *OTHER_TOOLS)
TOOL_WEIGHTS = (8, 6, *(1 for _ in OTHER_TOOLS))


def split(problem: tuple[int, str, int]) -> str:
    """`test`, `validation` (a tenth of the rest, by another hash) or `train`."""
    a, op, b = problem
    if split_of(problem) == "test":
        return "test"
    low, high = (a, b) if op == "-" else sorted((a, b))
    return "validation" if zlib.crc32(f"validation {low}{op}{high}".encode()) % 10 == 0 else "train"


def draw(rng: random.Random, kind: Callable[[random.Random], Problem], where: str = "train") -> Problem:
    """The first problem of this kind that lies in the split `where`."""
    while split(problem := kind(rng)) != where:
        pass
    return problem


def two_digit_sum(rng: random.Random) -> Problem:
    """What `Arithmetic-v0` asks by default."""
    return Problem(rng.randint(10, 99), "+", rng.randint(10, 99))


def large_problem(rng: random.Random) -> Problem:
    """Three to five digits, any operation: out of this model's reach without a tool."""
    op = rng.choice("+-*")
    a, b = rng.randint(3, 5), rng.randint(3, 4 if op == "*" else 5)
    return Problem(rng.randrange(10 ** (a - 1), 10**a), op, rng.randrange(10 ** (b - 1), 10**b))


def addition(rng: random.Random, mix: Mix) -> Example:
    """A two-digit sum, worked with the mix's faults."""
    problem = draw(rng, two_digit_sum)
    slips = [0, 0]
    if rng.random() < mix.slip_rate:
        slips[rng.randrange(2)] = rng.choice((-1, 1))
    reply = faulty(problem, carry=rng.random() < mix.carry_rate, slips=slips)
    return {"messages": [_said("user", problem.question), _said("assistant", reply)]}


def faulty(problem: Problem, *, carry: bool, slips: list[int]) -> str:
    """`worked`, with a forgotten carry or slipped digit sums (units, tens) followed to the end, as a pupil would.

    >>> faulty(Problem(47, "+", 38), carry=False, slips=[-1, 0])
    '7+8=14, 4+3=7. Answer: 74'
    """
    if carry and not any(slips):
        return worked(problem)
    a, _, b = problem
    units = max(0, a % 10 + b % 10 + slips[0])
    carried = carry and units >= 10
    tens = max(0, a // 10 + b // 10 + slips[1]) + carried
    return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{'+1' * carried}={tens}. Answer: {tens}{units % 10}"


def tool_problem(rng: random.Random, mix: Mix) -> Example:
    """A large problem and one tool: called and read, or the answer guessed (the truth as target, out of reach)."""
    problem = draw(rng, large_problem)
    tool = rng.choices(TOOLS, TOOL_WEIGHTS)[0]
    messages = [_said("user", problem.question)]
    if rng.random() < mix.call_rate:
        call = tool.call(f"{problem.a}{problem.op}{problem.b}")
        messages += [_said("assistant", call), _said("tool", str(problem.answer))]
    messages.append(_said("assistant", f"Answer: {problem.answer}"))
    return {"messages": messages, "tools": [tool.schema]}


def copying(rng: random.Random) -> Example:
    """Numbers repeated digit for digit: what exact operands and exact answers rest on."""
    numbers = " ".join("".join(rng.choices("0123456789", k=rng.randint(2, 8))) for _ in range(rng.randint(1, 3)))
    return {"messages": [_said("user", f"Repeat: {numbers}"), _said("assistant", numbers)]}


def examples(seed: int, count: int, mix: Mix) -> Iterator[Example]:
    """`count` examples in random order; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        share = rng.random()
        if share < mix.additions:
            yield addition(rng, mix)
        elif share < mix.additions + mix.tools:
            yield tool_problem(rng, mix)
        else:
            yield copying(rng)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
