"""A planted bug: where it stands, the source with it, and which of them CI plants.

A bug's place is a function, not a file: what changes elsewhere in the file, or the same words in another function of
it, never break it. `test_silent_bugs.py` says at once which bugs fit no longer; `heavy/test_mutations.py` plants them.
"""

from __future__ import annotations

import ast
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1].resolve()
COMMITS = 20
"""How far back CI looks for changes where no base is named and no branch `origin/main` is behind this one."""
OTHERS = 2
"""Bugs of files that did not change that CI plants with the others, other ones at each commit."""
MOST = 12
"""Bugs of changed files that CI plants at most: where more files changed, a sample, other ones at each commit."""


class Mutant(NamedTuple):
    """One planted bug."""

    bug: str
    """What goes wrong."""
    place: str
    """`file::function`: a file below llm_gym/, and the function, class or constant in it, as in `Chat.extend`."""
    old: str
    """Source text, in that function exactly once."""
    new: str
    """What replaces it."""
    tests: tuple[str, ...]
    """Tests below tests/ that must fail."""

    @property
    def file(self) -> str:
        return self.place.partition("::")[0]

    @property
    def files(self) -> set[str]:
        """The files, from the root of the repository, that decide whether it is caught."""
        return {f"llm_gym/{self.file}", *(f"tests/{test.partition('::')[0]}" for test in self.tests)}


def with_bug(source: str, mutant: Mutant) -> str:
    """The source of the mutant's file, with the bug in it; ValueError unless it fits exactly once."""
    name = mutant.place.partition("::")[2]
    lines = source.splitlines(keepends=True)
    spans = [(first, last) for found, first, last in _blocks(ast.parse(source), "") if found == name]
    fitting = [span for span in spans if mutant.old in "".join(lines[slice(*span)])]
    count = sum("".join(lines[slice(*span)]).count(mutant.old) for span in fitting)
    if count != 1:
        raise ValueError(f"{mutant.bug!r}: {mutant.place} holds {count} times, not once:\n{mutant.old}")
    ((first, last),) = fitting
    changed = "".join(lines[first:last]).replace(mutant.old, mutant.new)
    return "".join([*lines[:first], changed, *lines[last:]])


def _blocks(parent: ast.Module | ast.stmt, prefix: str) -> Iterator[tuple[str, int, int]]:
    """(qualified name, first line, line behind the last) of whatever has a name, as slices of lines."""
    for node in getattr(parent, "body", ()):
        for name in _names(node):
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
            yield prefix + name, first - 1, node.end_lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _blocks(node, f"{prefix}{node.name}.")


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def chosen(every: Sequence[Mutant], which: str = "", root: Path = ROOT) -> tuple[list[Mutant], str]:
    """The bugs to plant, in the order of `every`, and how they were chosen, in one sentence.

    `which` is "all", or a commit: bugs of the files (source or tests) that changed since, and `OTHERS` of the rest. Where
    it is empty, the commit is where this branch left `origin/main`, or else `COMMITS` commits back. What is drawn is drawn
    by the newest commit: the same in every process, other bugs at the next commit.
    """
    if which == "all":
        return list(every), f"all {len(every)}"
    head = _git(root, "rev-parse", "HEAD") or "no repository"
    base = _base(root, which)
    changed = set(_git(root, "diff", "--name-only", base, "--").splitlines()) if base else set()
    touched = [mutant for mutant in every if mutant.files & changed]
    rest = [mutant for mutant in every if not mutant.files & changed]
    drawn = random.Random(head)
    picked = [*drawn.sample(touched, min(MOST, len(touched))), *drawn.sample(rest, min(OTHERS, len(rest)))]
    how = (
        f"{min(MOST, len(touched))} of {len(touched)} in files changed since {base[:10] or 'nothing known'}, and "
        f"{min(OTHERS, len(rest))} of {len(rest)} others, drawn by {head[:10]} (all: make mutations)"
    )
    return [mutant for mutant in every if mutant in picked], how


def _base(root: Path, named: str) -> str:
    """The commit to compare with; "" where there is none."""
    if named:
        if not (base := _git(root, "merge-base", named, "HEAD")):
            raise ValueError(f"LLM_GYM_MUTANTS must be 'all' or a commit that this one descends from, got {named!r}")
        return base
    landed = _git(root, "merge-base", "origin/main", "HEAD")
    if landed and landed != _git(root, "rev-parse", "HEAD"):
        return landed
    return (_git(root, "rev-list", "--first-parent", "-n", str(COMMITS + 1), "HEAD").splitlines() or [""])[-1]


def _git(root: Path, *words: str) -> str:
    """What git says, "" where it says no: no repository, no such commit, no git."""
    try:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
