"""Names in the docstrings of the package are names of its code: what was renamed is not spoken of by its old name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import llm_gym

PACKAGE = Path(llm_gym.__file__).parent
NAMED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`")
OTHERS = {
    "AsyncLLM", "CallToolResult", "SyncVectorEnv", "do_not_compile", "environment_factory", "get_json_schema",
    "gpu_memory_utilization",
    "make_vec", "max_logprobs", "rollout_func", "speculative_config",
}  # fmt: skip
"""Names of Gymnasium, transformers, TRL, vLLM and MCP that no line of ours uses."""
ELSEWHERE = ("llm_gym.", "gymnasium.", "torch.", "asyncio.", "_multiprocessing.")
"""What stands behind these is not asked for."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def texts(tree: ast.Module) -> list[ast.Constant]:
    """The docstrings, those below variables included."""
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def names(tree: ast.Module) -> Iterator[str]:
    """Every identifier of a file, and the words of its strings that are no docstrings."""
    told = {id(text) for text in texts(tree)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module"):
            yield from str(getattr(node, field, "")).split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield from re.findall(r"\w+", node.value)


def test_a_name_in_backticks_is_a_name_of_the_code() -> None:
    files = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    known = OTHERS.union(*map(names, files.values()), *(file.with_suffix("").parts for file in files))
    homes: dict[str, set[str]] = {}
    for file, tree in files.items():
        for node in tree.body:
            if isinstance(node, DEFINITIONS):
                homes.setdefault(node.name, {"self"}).update((file.stem, file.parent.name))
    wrong = []
    for file, tree in files.items():
        for text in texts(tree):
            for found in NAMED.findall(str(text.value)):
                if found.startswith(ELSEWHERE):
                    continue
                *where, last = found.split(".")
                moved = where and where[-1].islower() and where[-1] not in homes.get(last, where)
                if moved or not known.issuperset(found.split(".")):
                    wrong.append(f"{file.relative_to(PACKAGE)}, line {text.lineno}: {found}")
    assert not wrong, "\n".join(wrong)
