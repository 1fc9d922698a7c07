"""The training text: worked additions, tool calls and copying, as chat messages.

How good the model is gets decided here, not by stopping early. It must learn the FORM of every skill well, and
apply it seldom: carries are forgotten in most additions, digits slip, and large problems are mostly guessed where
a tool would have given the answer. Reinforcement then has something to find.

No problem of the test split (`split_of`, a hash of the problem) is ever written, nor of the validation split that
the settings below were chosen on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm_gym.envs.arithmetic import split_of

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
    """How often one digit sum is wrong by one, and carried on consistently."""


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
"""Names nobody asks for: they make the model read the name from the schema instead of learning two by heart."""

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def in_validation(a: int, op: str, b: int) -> bool:
    """Whether a training problem is kept out of the corpus, to choose settings on: one in ten, by another hash."""
    a, b = (a, b) if op == "-" else sorted((a, b))
    return zlib.crc32(f"validation {a}{op}{b}".encode()) % 10 == 0


def is_corpus(a: int, op: str, b: int) -> bool:
    """Whether the corpus may show this problem."""
    return split_of((a, op, b)) == "train" and not in_validation(a, op, b)


def question(a: int, op: str, b: int) -> str:
    """The user's message, as `Arithmetic-v0` words it."""
    return f"What is {a} {op} {b}?"


def worked_addition(a: int, b: int, *, carry: bool = True, units_slip: int = 0, tens_slip: int = 0) -> str:
    """`7+8=15, 4+3+1=8. Answer: 85` for 47 + 38: units, tens with the carry, answer.

    A forgotten carry or a slipped digit sum is followed to the end, as a pupil would.
    """
    units = max(0, a % 10 + b % 10 + units_slip)
    carried = carry and units >= 10
    tens = max(0, a // 10 + b // 10 + tens_slip) + carried
    return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{'+1' * carried}={tens}. Answer: {tens}{units % 10}"


def addition(rng: random.Random, mix: Mix) -> Example:
    """A two-digit addition, worked with the mix's faults."""
    a, op, b = _draw(rng, lambda: (rng.randint(10, 99), "+", rng.randint(10, 99)))
    slip, place = (rng.choice((-1, 1)), rng.random() < 0.5) if rng.random() < mix.slip_rate else (0, False)
    reply = worked_addition(
        a, b, carry=rng.random() < mix.carry_rate, units_slip=slip * place, tens_slip=slip * (not place)
    )
    return {"messages": [_said("user", question(a, op, b)), _said("assistant", reply)]}


def large_problem(rng: random.Random) -> tuple[int, str, int]:
    """A problem of three to five digits, out of reach without a tool."""
    op = rng.choice("+-*")
    return _digits(rng, rng.randint(3, 5)), op, _digits(rng, rng.randint(3, 4 if op == "*" else 5))


def tool_problem(rng: random.Random, mix: Mix) -> Example:
    """A large problem with one tool in sight: called and read, or guessed (the truth as target, out of reach)."""
    a, op, b = _draw(rng, lambda: large_problem(rng))
    tool = rng.choices((PYTHON, CALCULATOR, *OTHER_TOOLS), (8, 6, *(1,) * len(OTHER_TOOLS)))[0]
    result = str(OPERATIONS[op](a, b))
    messages = [_said("user", question(a, op, b))]
    if rng.random() < mix.call_rate:
        messages += [_called(tool, f"{a}{op}{b}"), _said("tool", result)]
    messages.append(_said("assistant", f"Answer: {result}"))
    return {"messages": messages, "tools": [tool.schema]}


def copying(rng: random.Random) -> Example:
    """Numbers repeated digit for digit: what exact operands and exact answers rest on."""
    numbers = " ".join(_digits(rng, rng.randint(2, 8), leading_zero=True) for _ in range(rng.randint(1, 3)))
    return {"messages": [_said("user", f"Repeat: {numbers}"), _said("assistant", numbers)]}


def examples(seed: int, count: int, mix: Mix) -> Iterator[Example]:
    """`count` examples in random order; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        draw = rng.random()
        if draw < mix.additions:
            yield addition(rng, mix)
        elif draw < mix.additions + mix.tools:
            yield tool_problem(rng, mix)
        else:
            yield copying(rng)


def _draw(rng: random.Random, problem: Callable[[], tuple[int, str, int]]) -> tuple[int, str, int]:
    """The first problem that the corpus may show."""
    while not is_corpus(*(drawn := problem())):
        pass
    return drawn


def _digits(rng: random.Random, count: int, *, leading_zero: bool = False) -> Any:
    if leading_zero:
        return "".join(rng.choices("0123456789", k=count))
    return rng.randint(10 ** (count - 1), 10**count - 1)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _called(tool: Tool, expression: str) -> dict[str, Any]:
    function = {"name": tool.name, "arguments": {tool.argument: tool.wrap.format(expression)}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
