"""The policy of docs/grading.md, case by case: faults found by users, cases written from the page alone, neighbours."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pytest

from llm_gym.envs.dataset import Dataset
from llm_gym.envs.grading import Grade, verify, verify_many
from llm_gym.envs.gsm8k import GSM8K
from llm_gym.envs.tools.python_tool import PythonTool

HERE = Path(__file__).parent
BOX = "So we get $\\boxed{%s}$."


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def say(env: Dataset | GSM8K | PythonTool, text: str) -> float:
    return env.step(env.chat.encode_reply(text))[1]


def misjudged(cases: list[tuple[str, str, bool]], kind: str) -> list[tuple[str, str, Grade]]:
    """(reference, reply, grade) of each case that is graded otherwise than labelled."""
    grades = verify_many([(gold, text) for gold, text, _ in cases], kind=kind)
    return [(*case[:2], grade) for case, grade in zip(cases, grades, strict=True) if (grade.score == 1) != case[2]]


FAULTS = lines("grading_faults.jsonl")


@pytest.mark.parametrize("fault", sorted({case["fault"] for case in FAULTS}))
def test_what_users_found_misjudged_is_judged_right(fault):
    for kind in ("math", "number"):
        cases = [(c["gold"], c["reply"], c["equal"]) for c in FAULTS if (c["fault"], c["kind"]) == (fault, kind)]
        assert misjudged(cases, kind) == []


POLICY = lines("grading_policy.jsonl")


@pytest.mark.parametrize("policy", sorted({group["policy"] for group in POLICY}))
def test_cases_written_from_the_page_alone(policy):
    """750 cases written before the code was tried on them; at first 497 of 502 were right, and 246 of the second 248."""
    for kind in ("math", "number"):
        groups = [group for group in POLICY if (group["policy"], group["kind"]) == (policy, kind)]
        cases = [(g["gold"], text, key == "right") for g in groups for key in ("right", "wrong") for text in g[key]]
        assert misjudged(cases, kind) == []


def test_cases_written_by_a_newcomer_from_the_page_alone():
    """501 cases; at first 494 were right. Two labels were changed: the page did not say what a whole decimal is."""
    for kind in ("math", "number"):
        cases = [(c["gold"], c["text"], c["expected"]) for c in lines("grading_fresh.jsonl") if c["kind"] == kind]
        assert misjudged(cases, kind) == []


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("7", BOX % "\\log_2\\,128", True),
        ("128", BOX % "\\log_2 128", False),
        ("1/4", BOX % "\\sin^2 30^\\circ", True),
        ("1", "The answer is tan 45°", True),
        ("30", BOX % "\\sin 30^\\circ", False),
        ("\\sin 30^\\circ", BOX % "0.5", True),
        ("10", BOX % "\\dbinom 5 2", True),
        ("\\sqrt2", BOX % "\\sqrt2, \\sqrt{2}", True),
        ("\\sqrt2", BOX % "\\sqrt2, \\sqrt3", False),
        ("B", "\\boxed{B}, \\boxed{B}", True),
        ("1, 2, 1", "\\boxed{1}, \\boxed{2}, \\boxed{1}", True),
        ("1, 2, 1", "\\boxed{2}, \\boxed{1}", False),
        ("2, 1", "$1$, $2$", False),
        ("2, 1", "<answer>1</answer>, <answer>2</answer>", False),
        ("2, 1", "\\boxed{1} and \\boxed{2}", True),
        ("\\{2, 1\\}", "\\boxed{1}, \\boxed{2}", True),
    ],
)
def test_scripts_angles_and_several_boxes_mean_what_they_show(gold, text, right):
    assert misjudged([(gold, text, right)], "math") == []


DECORATED = (
    "%s", "{%s}", "(%s)", "\\left(%s\\right)", "x = %s", "\\text{Total} = %s", "%s\\text{ dollars}", "\\$%s", "%s\\%%",
    "\\frac{%s}{1}", "|%s|", "\\lfloor %s \\rfloor", "\\sqrt{(%s)^2}", "1\\cdot(%s)", "%s+0", "\\{%s\\}", "%s^\\circ",
    "-(-(%s))",
)  # fmt: skip


@pytest.mark.parametrize(
    "calculation", ["3*5", "30/2", "20-5", "8+7", "3\\times 5", "(3)(5)", "3(5)", "45\\div3", "3×5"]
)
def test_a_calculation_never_pays_whatever_is_around_it(calculation):
    cases = [("15", BOX % (form % calculation), False) for form in DECORATED]
    assert misjudged(cases, "math") == []
    assert misjudged(cases, "number") == []
    lists = [("(2, 15)", BOX % f"(2, {calculation})"), ("x > 15", BOX % f"x > {calculation}")]
    assert misjudged([(*case, False) for case in lists], "math") == []


def word_problems(rows: int) -> list[tuple[str, str]]:
    """(equation, answer) in the manner of SVAMP and of GSM-Hard: ( 8.0 - 3.0 ) is 5.0."""
    rng = random.Random(7)
    found = []
    while len(found) < rows:
        a, b, op = rng.randint(1, 99), rng.randint(1, 30), rng.choice("+-*/")
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
        found.append((f"( {a}.0 {op} {b}.0 )", str(float(value))))
    return found


@pytest.mark.parametrize("form", ["%s", "The answer is %s.", "#### %s", BOX, BOX % "x = %s", "<answer>%s</answer>"])
def test_no_word_problem_is_solved_by_its_own_equation(form):
    cases = [(answer, form % equation, False) for equation, answer in word_problems(100)]
    assert misjudged(cases, "number") == []
    assert misjudged(cases[:20], "math") == []


REFERENCES = (
    *(answer for _, answer in word_problems(60)),  # SVAMP, GSM-Hard
    "-9867630.0", "1.5656567e+17", "4.5e-05", "20.333333333333332", "27.999999999999996",  # GSM-Hard
    "000", "073", "999",  # AIME
    "98", "( 44 - 19 ) * 4 - 2", "(3 + 3) / (8 / 2 - 1)", "2 * 3 * 4", "7",  # Countdown: a target, or an expression
)  # fmt: skip


def test_a_reference_answers_itself():
    forms = ("%s", "The answer is %s", "#### %s", BOX, "<answer>%s</answer>")
    assert misjudged([(gold, form % gold, True) for gold in REFERENCES for form in forms], "math") == []


def test_a_column_of_numbers_is_graded_as_numbers(tmp_path):
    """A calculation, or a root in which one is hidden, earns nothing where tools are to be called."""
    path = tmp_path / "svamp.jsonl"
    problems = word_problems(5)
    path.write_text("".join(json.dumps({"question": e, "answer": a}) + "\n" for e, a in problems))
    with closing(Dataset(dataset=str(path), prompt="question")) as env:
        assert not env.metadata["blocking"]
    with (
        closing(PythonTool(dataset=str(path))) as tool,
        closing(Dataset(dataset=str(path), prompt="question")) as plain,
    ):
        for task, (equation, answer) in enumerate(problems):
            for env in (tool, plain):
                for text, score in ((equation, 0), (BOX % f"\\sqrt{{({answer})^2}}", 0), (f"Answer: {answer}", 1)):
                    env.reset(options={"task": task})
                    assert say(env, text) == score, (equation, text)


def test_environments_that_ask_for_numbers_take_them_behind_their_calculation(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "What is 28 + 32?", "answer": "28 + 32 = <<28+32=60>>60\n#### 60"}) + "\n")
    with closing(GSM8K(dataset=str(path))) as env:
        for end, score in ((60, 1), (61, 0)):
            env.reset(options={"task": 0})
            assert say(env, f"The answer is 28 + 32 = {end}.") == score
    with closing(PythonTool()) as tool:
        _, info = tool.reset(seed=1)
        calculation = info["messages"][-1]["content"].removeprefix("What is ").removesuffix("?")
        assert say(tool, f"The answer is {calculation} = {eval(calculation)}.") == 1


def test_a_column_with_anything_else_is_graded_as_mathematics(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "answer": a}) + "\n" for a in ("12", "\\sqrt2")))
    with closing(Dataset(dataset=str(path))) as env:
        assert env.metadata["blocking"]
        env.reset(options={"task": 0})
        assert say(env, BOX % "\\sqrt{144}") == 1


@pytest.mark.parametrize("scale", [1, 3, 10, 7.5, 1e-3, 123.456])
def test_what_python_prints_of_fractions_and_roots_is_their_value(scale):
    rng, cases = random.Random(3), []
    for _ in range(40):
        a, b = rng.randint(1, 99), rng.randint(2, 99)
        cases += [(f"{a}/{b}", str(a / b), True), (f"{a}/{b}", repr(a / b * scale / scale), True)]
        cases += [(f"{a}/{b}", str(a / b * (1 + 1e-13)), False)] if (a / b) % 1 else []
    assert misjudged(cases, "number") == []
    roots = [(f"\\sqrt{{{n}}}", str(n**0.5 * scale / scale), True) for n in (2, 3, 5, 6, 7, 10, 11)]
    assert misjudged([*roots, ("\\sqrt{2}", "1.41421356237319", False)], "math") == []


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("-10", "The average was -10 degrees.", True),
        ("-10", "It is - 10", True),
        ("-10", "profit: -10", True),
        ("10", "5 apples + 10", False),
        ("10", "x - 10", False),
        ("10", "<<2*5=10>>10 games", True),
        ("10", "<b>10</b>", True),
        ("10", "so => 10", True),
        ("10", "It adds up to 10.", True),
        ("10", "There are 10 more than before.", True),
        ("10", "10 is ruled out", False),
        ("10", "3 : 10", False),
        ("10", "Step 3: 10", True),
        ("10", "f(2) = 10", True),
        ("10", "20 x .5 = 10", True),
        ("10", "The answer is log 10", False),
        ("10", "The answer is log_2 10", False),
        ("10", "The answer is log base 2 of 10", False),
        ("10", "The answer is sin 10°", False),
        ("10", "The answer is f(10)", False),
        ("10", "The answer is factorial(10)", False),
        ("10", "The answer is ten (10)", True),
        ("10", "The answer is 10 if n is even, otherwise 6", False),
        ("10", "The answer is 10 if n is even and 6 if it is odd", False),
        ("10", "The answer is 10 unless n is odd, in which case it is 6", False),
        ("10", "It is 6 when n is even, 10 when n is odd", False),
        ("10", BOX % "10 \\text{ if } n \\text{ is even, otherwise } 6", False),
        ("10", "She has 15 when she has paid, so she gives him 10", True),
        ("10", "The answer is 10 if we count the 2 teachers", True),
    ],
)
def test_what_stands_beside_a_number_decides(gold, text, right):
    assert misjudged([(gold, text, right)], "number") == []


def test_long_replies_of_signs_cost_little():
    """Each of these has made, or could make, a pattern try all the ways to divide it."""
    for text in (
        "5" + "$" * 58 + "6",
        "5" + " %" * 28 + "x6",
        "\\boxed{5}" + " " * 59 + "!\\boxed{6}",
        "1." + "(2" * 40_000,
    ):
        assert verify("9", text * 3, kind="number").score == 0.0


@pytest.mark.parametrize("kind", ["number", "math"])
def test_thousands_set_apart_by_spaces_are_read_behind_every_marker(kind):
    for form in (
        "%s",
        "#### %s",
        "\\boxed{%s}",
        "<answer>%s</answer>",
        "Answer: %s",
        "The answer is %s.",
        "Answer: $%s",
    ):
        right, wrong = (
            [("1234567", form % "1 234 567", True)],
            [("234", form % "1 234", False), ("3", form % "1 2 3", False)],
        )
        assert misjudged([*right, *wrong], kind) == []
