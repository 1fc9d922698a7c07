"""Scorers of reasoning-gym that evaluate the answer as Python: what of a policy's text they may see.

Four call `eval`, five sympy's parser, which is `eval` too. A policy that writes `exit()`, `9**9**9` or something
worse would run it in the trainer's process. The first four are given `ast.literal_eval`; for the others an answer must
be arithmetic or algebra of a bounded size.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from llm_gym.errors import BadReply

LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Data sets whose scorer evaluates an answer that it cannot read otherwise: a list."""
ARITHMETIC = frozenset({"countdown", "puzzle24"})
"""Those whose answer is arithmetic, without powers."""
ALGEBRA = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
"""Those whose answer is an expression of symbols."""
FUNCTIONS = frozenset("Abs acos asin atan cos cosh exp ln log sin sinh sqrt tan tanh".split())
LONGEST, DEGREE, DEPTH = 400, 64, 2
"""Most characters of an expression, the highest power in it, and how deep functions of functions may go."""
_SUMS = re.compile(r"[\d\s()+*/.-]*")
_NODES = (ast.Expression, ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.Call, ast.operator, ast.unaryop, ast.Load)


def disarm(name: str, module: Any) -> None:
    """Gives the module of a data set's scorer an `eval` that reads nothing but literals."""
    if name in LITERALS:
        module.eval = ast.literal_eval


def check(name: str, answer: str) -> None:
    """Checks an answer before the scorer of data set `name` evaluates it.

    Raises:
        BadReply: it is no expression of the wanted kind and size.
    """
    if name in ARITHMETIC and (len(answer) > LONGEST or not _SUMS.fullmatch(answer) or "**" in answer):
        raise BadReply(f"{answer[:40]!r} is no arithmetic")
    if name in ALGEBRA and not _is_algebra(answer.strip()):
        raise BadReply(f"{answer[:40]!r} is no algebra of a readable size")


def _is_algebra(text: str) -> bool:
    """Whether a text is numbers, symbols, + - * / ** and known functions, and none of it grows without bounds."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if tree is None or not all(isinstance(node, _NODES) and _is_plain(node) for node in ast.walk(tree)):
        return False
    return _degree(tree.body) <= DEGREE and _depth(tree) <= DEPTH


def _is_plain(node: ast.AST) -> bool:
    """Whether a part of an expression is a number, a name without underscores, or a call of a known function."""
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return name in FUNCTIONS or re.fullmatch(r"[A-Za-z]\d?|pi", name) is not None
        case ast.Call(func=ast.Name(id=name), args=[_], keywords=[]):
            return name in FUNCTIONS
        case ast.Call():
            return False
    return True


def _degree(node: ast.AST) -> float:
    """How high powers go, those of factors added up; infinite where an exponent holds a power."""
    match node:
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            inside = list(ast.walk(right))
            numbers = [abs(n.value) for n in inside if isinstance(n, ast.Constant)]  # type: ignore[arg-type]
            if any(isinstance(n, ast.Pow) for n in inside):
                return math.inf
            return _degree(left) * max(1.0, math.prod(map(float, numbers)), sum(numbers))
        case ast.BinOp(op=ast.Mult() | ast.Div(), left=left, right=right):
            return _degree(left) + _degree(right)
    return max(map(_degree, ast.iter_child_nodes(node)), default=1.0)


def _depth(node: ast.AST) -> int:
    """How deep calls stand in calls."""
    return isinstance(node, ast.Call) + max(map(_depth, ast.iter_child_nodes(node)), default=0)
