"""Grading: agreement with the labels of other suites, and speed beside math-verify.

    python benchmarks/grading.py agreement shared/data/grader   # the table of docs/grading.md
    python benchmarks/grading.py speed

Agreement is counted on two halves of each file, split by a hash of the case: rules were written
while looking at the first half only (docs/grading.md gives the first count of the second). Speed is
replies graded per CPU-second of one process, the two graders in turn, best of five.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_gym.envs.grading import Grade, verify, verify_many

POLICY = {"skyrl_gsm8k": "hash"}
"""Files whose labels follow one policy of where the answer stands, and not `auto`."""
Case = dict[str, Any]


def half(case: Case) -> str:
    """Which half a case is in."""
    digest = hashlib.sha256(json.dumps([case["gold"], case["pred"]]).encode()).digest()
    return "held back" if digest[0] % 2 else "seen"


def graded(path: Path) -> list[tuple[Case, Grade]]:
    """Every case of a file with its grade."""
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    where = POLICY.get(path.stem, "auto")
    grades = verify_many([(case["gold"], case["pred"]) for case in cases], where=where, deadline=30.0)
    return list(zip(cases, grades, strict=True))


def disagreements(folder: Path) -> list[tuple[str, Case, Grade]]:
    """(file, case, grade) of every case graded otherwise than labelled."""
    return [
        (path.stem, case, grade)
        for path in sorted(folder.glob("*.jsonl"))
        for case, grade in graded(path)
        if (grade.score == 1) != case["equal"]
    ]


def agreement(folder: Path) -> None:
    """Prints the agreement of every file and half, and the disagreements."""
    print("| file | seen | held back | agreement |\n|---|---:|---:|---:|")
    totals = {"seen": [0, 0], "held back": [0, 0]}
    for path in sorted(folder.glob("*.jsonl")):
        counts = {"seen": [0, 0], "held back": [0, 0]}
        for case, grade in graded(path):
            for count in (counts, totals):
                count[half(case)][0] += (grade.score == 1) == case["equal"]
                count[half(case)][1] += 1
        print(f"| {path.stem} | {_row(counts)} |")
    print(f"| all | {_row(totals)} |\n\n| file | reference | reply | label | status |\n|---|---|---|---|---|")
    for name, case, grade in disagreements(folder):
        gold, pred = (short(case[key]) for key in ("gold", "pred"))
        print(f"| {name} | `{gold}` | `{pred}` | {'equal' if case['equal'] else 'different'} | {grade.status} |")


def _row(counts: dict[str, list[int]]) -> str:
    right, of = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return " | ".join([*(f"{a}/{b}" for a, b in counts.values()), f"{right / of:.2%}"])


def short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 70 else f"... {text[-66:]}"


def speed() -> None:
    """Prints replies graded per CPU-second, and the ratio."""
    from math_verify import parse
    from math_verify import verify as equal

    forms = ("The answer is {}.", "so\n#### {}", "It is $\\boxed{{{}}}$.", "They make {} in all.")
    pairs = [(str(n * 37 % 9973), forms[n % 4].format((n * 37 + n % 2) % 9973)) for n in range(2000)]

    golds = {gold: parse(gold) for gold, _ in pairs}  # verify keeps references it has read, so neither reads them here

    def ours() -> list[bool]:
        return [verify(gold, text).score == 1 for gold, text in pairs]

    def theirs() -> list[bool]:
        return [equal(golds[gold], parse(text)) for gold, text in pairs]

    rates = {"llm_gym": 0.0, "math-verify": 0.0}
    for _ in range(5):
        for name, grade in (("llm_gym", ours), ("math-verify", theirs)):
            rates[name] = max(rates[name], len(pairs) / _cpu_seconds(grade))
    for name, rate in rates.items():
        print(f"{name:12} {rate:10,.0f} replies per CPU-second")
    print(f"ratio {rates['llm_gym'] / rates['math-verify']:.1f}")


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        speed()
    else:
        agreement(Path(sys.argv[2]))
