"""Finds the final answer in a reply and compares it with the reference.

Numbers are read and compared here, exactly and in microseconds. Everything else (expressions,
sets, intervals, tuples, matrices, equations, words) goes to a worker process with a deadline.
Where the answer stands is a policy, and it is explicit (`where`, see the module of that name).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from llm_gym.envs.grading import workers
from llm_gym.envs.grading.numbers import Undone, near, parse
from llm_gym.envs.grading.read import Refused, choice, number_in, stated
from llm_gym.envs.grading.where import SAYS, WHERE, Span, answer_part, find, last_formula
from llm_gym.errors import DataError, SettingError, unknown

MAX_ANSWER = 2_000
"""Characters of an answer; a longer one is not read."""

Status = Literal["correct", "wrong", "no_answer", "unparsed", "timeout", "crashed", "no_reference"]
"""`no_answer`: the reply states none, or (for a number) none that is one. `unparsed`: what it states cannot
be read. `timeout`, `crashed`: comparing it overran its deadline or its memory. `no_reference`: the reference states
nothing. All but `correct` score 0."""
Kind = Literal["math", "number"]


@dataclass(frozen=True, slots=True)
class Grade:
    """The outcome of grading one reply."""

    score: float
    """1 if right, else 0."""
    status: Status
    extracted: str | None
    """The answer as it was read, a number in canonical form; None if there was none."""
    why: str
    """One sentence for a person."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is left to compare by a worker."""

    gold: str
    answer: str
    ordered: bool
    deadline: float


def verify(
    gold: str | int | float,
    text: str,
    *,
    where: str = "auto",
    kind: Kind = "math",
    ordered: bool = True,
    deadline: float = workers.DEADLINE,
) -> Grade:
    """Grades a reply against a reference.

    >>> verify("0.5", r"It is \\boxed{\\frac{1}{2}}.").score, verify("1,234", "Answer: 1234").score
    (1.0, 1.0)
    >>> verify("42", "I think it is 41.").why
    '41 is not 42.'

    Args:
        gold: the reference: a number (`1,234`, `$5`, `-3.5`, `1/2`), an expression, set, interval, tuple, matrix,
            equation or word, in LaTeX or plain text; or a solution that states one (in a box, after `####`).
        text: the whole reply. Thinking up to the last `</think>` is not part of the answer.
        where: `auto`, `hash` (`#### N`), `boxed`, `tag` (`<answer>`), `phrase` ("Answer: N") or `last`.
        kind: `math`: anything equal to the reference is right (`\\sqrt{16}` for 4, but not the calculation `2 * 2`).
            `number`: the reference is a number, and the answer must be written as one; no worker is ever needed.
        ordered: a bare list (`1, -2`) must keep the reference's order. Sets, `1 and -2` and `\\pm 1` never need to.
        deadline: seconds a worker may take, from when it takes the case; then it is killed (`timeout`).

    Raises:
        DataError: `gold` is no number, with `kind="number"`.
        SettingError: an unknown `where` or `kind`, or no worker process can be started.
    """
    outcome = read(gold, text, where=where, kind=kind, ordered=ordered, deadline=deadline)
    return outcome if isinstance(outcome, Grade) else _judge(outcome)


async def verify_async(gold: str | int | float, text: str, **options: object) -> Grade:
    """`verify`, without holding up the event loop while a worker compares."""
    outcome = read(gold, text, **options)  # type: ignore[arg-type]
    return outcome if isinstance(outcome, Grade) else await asyncio.to_thread(_judge, outcome)


def verify_many(pairs: Iterable[tuple[str | int | float, str]], **options: object) -> list[Grade]:
    """The grade of every (gold, text), in order; the workers share what needs them.

    Args:
        pairs: the references and replies.
        options: as for `verify`.

    Raises:
        DataError, SettingError: as `verify`, before anything is compared.
    """
    outcomes = [read(gold, text, **options) for gold, text in pairs]  # type: ignore[arg-type]
    cases = list(dict.fromkeys(outcome for outcome in outcomes if isinstance(outcome, Case)))
    if not cases:
        return [outcome for outcome in outcomes if isinstance(outcome, Grade)]
    with ThreadPoolExecutor(workers.pool().size, "llm_gym-grading") as threads:
        grades = dict(zip(cases, threads.map(_judge, cases), strict=True))
    return [outcome if isinstance(outcome, Grade) else grades[outcome] for outcome in outcomes]


def read(
    gold: str | int | float,
    text: str,
    *,
    where: str = "auto",
    kind: Kind = "math",
    ordered: bool = True,
    deadline: float = workers.DEADLINE,
) -> Grade | Case:
    """What `verify` can tell without a worker: the grade, or else the case for one."""
    if where not in WHERE:
        raise SettingError(unknown("where", where, WHERE))
    if kind not in ("math", "number"):
        raise SettingError(unknown("kind", kind, ("math", "number")))
    try:
        want = reference(gold)
    except DataError as error:
        return Grade(0.0, "no_reference", None, str(error))
    numeric = not isinstance(want, str)
    if kind == "number" and not numeric:
        raise DataError(f"gold: {gold!r} is not a number.")
    answer = answer_part(text)
    span = None if answer is None else find(answer, where, numeric=numeric)
    if span is None:
        return _nothing(numeric)
    if isinstance(want, str):
        return _general(want, span, ordered, deadline)
    whole = want == int(want)
    got = number_in(span, whole=whole, alone=kind == "number")
    if isinstance(got, Refused):
        return Grade(0.0, "wrong", None, got.value)
    if got is not None and not (isinstance(got, Undone) and kind == "math" and got == want):
        return _number(want, got, gold)
    return _nothing(numeric) if kind == "number" else _general(written(gold), span, ordered, deadline, whole=whole)


def _number(want: int | Fraction, got: int | Fraction, gold: str | int | float) -> Grade:
    """Compares two numbers."""
    if got == want:
        if isinstance(got, Undone) and not re.search(r"\d/\d|frac", written(gold)):
            return Grade(0.0, "unparsed", str(got), "The reply leaves a division to the reader.")
        return Grade(1.0, "correct", str(got), f"{got} is the reference.")
    if near(got, want):
        return Grade(1.0, "correct", str(got), f"{got} is {want}, rounded.")
    return Grade(0.0, "wrong", str(got), f"{got} is not {want}.")


def _general(want: str, span: Span, ordered: bool, deadline: float, *, whole: bool = False) -> Grade | Case:
    """Compares what needs no mathematics; the rest is a case."""
    letter = choice(want)
    answer = stated(span, letter=letter is not None, whole=whole)
    if isinstance(answer, Refused):
        return Grade(0.0, "wrong", None, answer.value)
    if answer is None:
        return _nothing(parse(want) is not None)
    if answer == want or (letter is not None and choice(answer) == letter):
        return Grade(1.0, "correct", answer, f"{answer} is the reference.")
    if len(answer) > max(MAX_ANSWER, 2 * len(want)):
        return Grade(0.0, "unparsed", answer[:100], f"The answer has {len(answer):,} characters.")
    return Case(want, answer, ordered, deadline)


def _judge(case: Case) -> Grade:
    """Has a worker compare."""
    verdict = workers.pool().ask(case.gold, case.answer, ordered=case.ordered, deadline=case.deadline)
    status, why = _VERDICTS[verdict]
    shown = case.answer[:200]
    return Grade(float(verdict == "equal"), status, shown, why.format(shown, case.gold[:200], case.deadline))


_VERDICTS: dict[str, tuple[Status, str]] = {
    "equal": ("correct", "{0} equals {1}."),
    "different": ("wrong", "{0} is not {1}."),
    "unparsed": ("unparsed", "{0} cannot be read as an answer like {1}, or leaves a calculation to the reader."),
    "timeout": ("timeout", "Comparing {0} with {1} took more than {2:g} s."),
    "crashed": ("crashed", "Comparing {0} with {1} took more memory than a worker has."),
}


def _nothing(numeric: bool) -> Grade:
    return Grade(0.0, "no_answer", None, f"The reply states no answer{' that is a number' if numeric else ''}.")


@lru_cache(maxsize=65536)
def reference(gold: str | int | float) -> int | Fraction | str:
    """The reference as an exact number, or else as the text of the answer it states.

    Raises:
        DataError: it states none.
    """
    answer = written(gold)
    value = parse(answer)
    if value is not None:
        return value
    if not SAYS.search(answer):
        raise DataError(f"gold: {gold!r} states no answer.")
    return answer


@lru_cache(maxsize=65536)
def written(gold: str | int | float) -> str:
    """The reference as it is written, without what stands around it."""
    text = str(gold).strip()
    return text if parse(text) is not None else _stated_reference(text)


def _stated_reference(text: str) -> str:
    """The part of a reference solution that states its answer: a box, what follows `####`, the last formula."""
    text += "}" * min(20, text.count("{") - text.count("}"))  # cut in a box
    for where in ("hash", "boxed"):
        if (span := find(text, where)) is not None and span.text.strip():
            return span.text.strip()
    formula = last_formula(text)
    return formula.text if formula is not None else text
