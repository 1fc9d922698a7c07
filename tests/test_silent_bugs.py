"""The tables of planted bugs fit the source: each bug can be planted, and its tests are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from mutations import LATER
from mutations_all import EVERY, TABLES
from planted import MOST, OTHERS, ROOT, Mutant, chosen, with_bug

SOURCE = """
def first(x):
    return x + 1


class Second:
    bound = 3

    @property
    def first(self):
        return x + 1
"""


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: mutant.bug)
def test_the_bug_can_be_planted_and_has_a_test(mutant: Mutant) -> None:
    source = (ROOT / "llm_gym" / mutant.file).read_text(encoding="utf-8")
    planted = with_bug(source, mutant)
    assert planted != source
    compile(planted, mutant.file, "exec")
    for test in mutant.tests:
        file, *_, name = re.sub(r"\[.*", "", test).split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_no_bug_is_listed_twice() -> None:
    assert len(TABLES) > 10
    assert len({*(mutant.bug for mutant in EVERY), *LATER}) == len(EVERY) + len(LATER)


def bug(place: str, old: str = "return x + 1") -> Mutant:
    return Mutant("a bug", place, old, "return x", ())


@pytest.mark.parametrize("place", ["it.py::first", "it.py::Second.first"])
def test_a_bug_is_planted_in_its_function_wherever_that_stands(place: str) -> None:
    before, between, behind = SOURCE.split("return x + 1")
    first = place == "it.py::first"
    expected = f"{before}return x{'' if first else ' + 1'}{between}return x{' + 1' if first else ''}{behind}"
    assert with_bug(SOURCE, bug(place)) == expected
    above = "import os\n\n\ndef other():\n    return x + 1\n\n"
    assert with_bug(above + SOURCE, bug(place)) == above + expected


def test_a_constant_is_a_place_too() -> None:
    assert with_bug(SOURCE, bug("it.py::Second.bound", "3")) == SOURCE.replace("bound = 3", "bound = return x")


@pytest.mark.parametrize(
    ("place", "old"),
    [("it.py::third", "x"), ("it.py::first", "x + 2"), ("it.py::first", "3"), ("it.py::Second", "r")],
    ids=["no such function", "no such text", "in another function", "more than once"],
)
def test_a_bug_that_fits_no_longer_is_refused(place: str, old: str) -> None:
    with pytest.raises(ValueError, match="'a bug': .* not once"):
        with_bug(SOURCE, bug(place, old))


# What CI plants, in a repository of one commit for each file.
NAMES = [f"file_{i:02}.py" for i in range(40)]
TABLE = [Mutant(f"{f}, {n}", f"{f}::f", "", "", (f"test_{f}::test_it",)) for f in NAMES for n in range(3)]


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    (root / "llm_gym").mkdir()
    (root / "tests").mkdir()
    git(root, "init", "-q", "-b", "main")
    for name in NAMES:
        (root / "llm_gym" / name).touch()
        (root / "tests" / f"test_{name}").touch()
        git(root, "add", ".")
        git(root, "commit", "-qm", name)
    return root


@pytest.fixture
def clone(first: Path, tmp_path: Path) -> Path:
    git(tmp_path, "clone", "-q", str(first), "clone")
    return tmp_path / "clone"


def files(root: Path, which: str = "") -> tuple[list[str], str]:
    mutants, how = chosen(TABLE, which, root)
    assert mutants == [mutant for mutant in TABLE if mutant in mutants]
    return [mutant.file for mutant in mutants], how


def test_every_bug_can_be_asked_for(clone: Path) -> None:
    assert len(files(clone, "all")[0]) == len(TABLE)


def test_every_bug_of_what_changed_since_a_commit_and_a_sample_of_the_others(clone: Path) -> None:
    found, how = files(clone, "HEAD~2")
    assert len(found) == 2 * 3 + OTHERS
    assert found[-6:] == [NAMES[-2]] * 3 + [NAMES[-1]] * 3
    assert "6 of 6 in files changed" in how
    assert files(clone, "HEAD~2") == (found, how)


def test_a_branch_is_compared_with_where_it_left_the_main_one(clone: Path) -> None:
    git(clone, "update-ref", "refs/remotes/origin/main", "HEAD~4")
    assert len(files(clone)[0]) == 4 * 3 + OTHERS


def test_a_fresh_clone_looks_back_and_is_bounded(clone: Path) -> None:
    found, how = files(clone)
    assert len(found) == MOST + OTHERS
    assert f"{MOST} of 60 in files changed" in how


@pytest.mark.parametrize("edited", ["llm_gym/file_03.py", "tests/test_file_03.py"])
def test_what_is_edited_counts_as_changed(clone: Path, edited: str) -> None:
    (clone / edited).write_text("x = 1\n")
    found, how = files(clone, "HEAD")
    assert "3 of 3 in files changed" in how
    assert found.count("file_03.py") == 3


def test_other_bugs_are_drawn_at_another_commit(clone: Path) -> None:
    before = files(clone, "HEAD")[0]
    git(clone, "commit", "-qm", "nothing", "--allow-empty")
    assert files(clone, "HEAD")[0] != before


def test_outside_of_a_repository_there_is_a_sample(tmp_path: Path) -> None:
    assert len(files(tmp_path)[0]) == OTHERS


def test_a_base_that_is_none_is_refused(clone: Path) -> None:
    with pytest.raises(ValueError, match="LLM_GYM_MUTANTS must be 'all' or a commit .* got 'mian'"):
        chosen(TABLE, "mian", clone)
