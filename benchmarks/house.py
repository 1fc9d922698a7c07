"""How much there is to read: what one default training step enters, lines of code, files of each folder.

    python benchmarks/house.py

A line of code holds a token that is neither comment nor docstring. Functions are those that a step calls, each once;
lambdas and comprehensions belong to the function around them.
"""

from __future__ import annotations

import ast
import io
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import llm_gym
from llm_gym.harness import TrainConfig, Trainer, load

PACKAGE = Path(llm_gym.__file__).parent
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def lines_of_code(source: str) -> int:
    """Lines that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - docstrings)


def entered() -> set[tuple[str, str]]:
    """(file, function) of our own that one default training step calls, in any thread."""
    codes: set[CodeType] = set()

    def see(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    config = load(TrainConfig, sets=["eval.episodes=0", "steps=2"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, out=Path(folder) / "run")
        trainer.train_step()
        threading.setprofile(see)
        sys.setprofile(see)
        try:
            trainer.train_step()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            trainer.close()
    own = [(Path(code.co_filename), code.co_qualname) for code in codes if code.co_filename.startswith(str(PACKAGE))]
    return {(str(file.relative_to(PACKAGE)), name.partition(".<locals>.<")[0]) for file, name in own}


def main() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    step = entered()
    print(f"one default training step enters {len({file for file, _ in step})} files, {len(step)} functions")
    print(
        f"{sum(lines_of_code(file.read_text(encoding='utf-8')) for file in files):,} lines of code, {len(files)} files"
    )
    folders = Counter(str(file.parent.relative_to(PACKAGE)) for file in files if file.name != "__init__.py")
    for folder, count in folders.most_common():
        print(f"{count:4}  {folder if folder != '.' else 'llm_gym'}")


if __name__ == "__main__":
    main()
