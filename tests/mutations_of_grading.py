"""Bugs that a grader could have: rewards for what is no answer, and none for what is one.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

FILE = "envs/test_grading_policy.py"
GRADING = (
    Mutant(
        "a calculation is taken for the number that it gives",
        "envs/grading/compare.py::_Comparison.values",
        "if equal and not calculation and _leaves_work(left, right):",
        "if False:",
        (f"{FILE}::test_a_calculation_never_pays_whatever_is_around_it",),
    ),
    Mutant(
        "a division left undone is a number",
        "envs/grading/numbers.py::number",
        "return Undone(value) if undone else value",
        "return value",
        (f"{FILE}::test_cases_written_from_the_page_alone[fractions]",),
    ),
    Mutant(
        "a bound or a denial before a number is not seen",
        "envs/grading/beside.py::denied",
        "    if tail.endswith(_BOUNDS) or tail.endswith(_DENIALS)",
        "    if False",
        (f"{FILE}::test_cases_written_from_the_page_alone[relations]",),
    ),
    Mutant(
        "a leading decimal point is dropped",
        "envs/grading/latex.py::clean",
        '    if text.startswith(".") and not text[1:2].isdigit():',
        '    if text.startswith("."):',
        (f"{FILE}::test_what_users_found_misjudged_is_judged_right[leading decimal point]",),
    ),
    Mutant(
        "what double precision prints is wrong in its last digit",
        "envs/grading/numbers.py::PRECISION",
        "PRECISION = Fraction(1, 2**50)",
        "PRECISION = Fraction(0)",
        (f"{FILE}::test_what_python_prints_of_fractions_and_roots_is_their_value",),
    ),
    Mutant(
        "a column of numbers is graded as mathematics",
        "envs/tools/questions.py::questions",
        'kind="number" if numbers else "math"',
        'kind="math"',
        (f"{FILE}::test_a_column_of_numbers_is_graded_as_numbers",),
    ),
)
