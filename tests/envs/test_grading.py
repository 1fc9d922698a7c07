"""Numeric grading: what counts as an answer, what never does, and the labelled data."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.envs.grading import Grade, verify
from llm_gym.envs.grading.numbers import parse
from llm_gym.errors import DataError, SettingError

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def reference(answer: str) -> str:
    return answer.rpartition("####")[2].strip()


def lines(path):
    return [json.loads(line) for line in path.open()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_reference_answers_of_gsm8k_score_in_every_case(shared, split):
    rows = lines(shared(f"data/gsm8k/{split}.jsonl"))
    assert len(rows) == {"train": 7473, "test": 1319}[split]
    assert [row["answer"] for row in rows if verify(reference(row["answer"]), row["answer"]).score != 1] == []


def test_the_labelled_outputs_of_four_models_are_graded_right_in_every_case(shared):
    """5,276 replies ending in `A: N` or in nothing of the kind, labelled by their authors."""
    golds = [reference(row["answer"]) for row in lines(shared("data/gsm8k/test.jsonl"))]
    outputs = lines(shared("data/gsm8k/example_model_solutions.jsonl"))
    wrong = []
    for gold, row in zip(golds, outputs, strict=True):
        for model in MODELS:
            grade = verify(gold, row[model]["solution"])
            if (grade.score == 1) != row[model]["is_correct"]:
                wrong.append((gold, grade, row[model]["solution"][-100:]))
    assert wrong == []


@pytest.mark.parametrize("name", ["lm_eval_cot", "open_instruct_gsm8k", "reasoning_gym", "tinker_cookbook"])
def test_cases_of_other_suites_whose_reference_is_a_number(shared, name):
    cases = [case for case in lines(shared(f"data/grader/{name}.jsonl")) if parse(case["gold"]) is not None]
    assert len(cases) >= 5
    assert [case for case in cases if (verify(case["gold"], case["pred"]).score == 1) != case["equal"]] == []


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("18", "She makes $18."),
        ("18", "9 * 2 = $<<9*2=18>>18 a day.\n#### 18"),
        ("18", "#### 5\nNo, wait.\n#### 18"),
        ("18", "####: 18 dollars"),
        ("18", "so it is \\boxed{17}, no, \\boxed{18}"),
        ("18", "\\boxed{\\text{18}}"),
        ("18", "\\boxed{\\$18}"),
        ("18", "<answer>The answer is \\boxed{18}</answer>"),
        ("18", "<answer>12</answer> or rather <answer> 18 </answer>"),
        ("18", "**Answer:** 18"),
        ("18", "**Answer**: **18**"),
        ("18", "Final Answer: 18 eggs in 3 days"),
        ("18", "The answer is 18. I checked it 3 times."),
        ("18", "The answer is 2 * 9 = 18."),
        ("18", "the answer is: x = 18"),
        ("18", "A: 18"),
        ("18", "<think>It may be 12.</think>It is 18"),
        ("18", "１８"),
        ("1234", "1,234"),
        ("1,234", "1234.00"),
        ("1234", "1\\,234"),
        ("1234", "$1{,}234$"),
        ("-5", "−5"),
        ("-5", "Answer: -$5"),
        ("-5", "Answer: $-5"),
        ("+7", "7"),
        ("12", "12.0"),
        ("50", "50%"),
        ("50", "50\\%"),
        ("0.5", "1/2"),
        ("0.5", "\\frac{1}{2}"),
        (".5", "0.50"),
        ("3.5", "It weighs 3.5 kg"),
        (7, "seven, that is 7."),
    ],
)
def test_right_answers(gold, text):
    assert verify(gold, text).status == "correct"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("12", "12.5"),
        ("5", "12.5"),
        ("5", "5abc"),
        ("5", "abc5"),
        ("5", "Answer: 5abc"),
        ("12", "<think>so 12</think><answer>12.5</answer>"),
        ("12", "<think>so 12"),
        ("12", "\\boxed{12} or \\boxed{13}"),
        ("12", "\\boxed{}, 12"),
        ("12", "\\boxed{12, 13}"),
        ("12", "12\n#### thirteen"),
        ("12", "#### 12 million"),
        ("12", "Answer: 12 + 1"),
        ("12", "Answer: 12 - 3"),
        ("5", "-5"),
        ("5", "Answer: 20-5"),
        ("5", "1/5"),
        ("1", "1/5"),
        ("5", "1/0"),
        ("5", "2^5"),
        ("5", "5*4"),
        ("30", "5:30"),
        ("5", "5:30"),
        ("234", "1,234"),
        ("34", "12,34"),
        ("2", "\\sqrt{2}"),
        ("4", "4\\sqrt{2}"),
        ("12", ""),
        ("12", "no number"),
        ("12", "1 2"),
        ("1" * 10, "1" * 9),
    ],
)
def test_no_reward_for_anything_else(gold, text):
    grade = verify(gold, text)
    assert (grade.score, grade.status in ("wrong", "no_answer", "unparsed")) == (0.0, True)


@pytest.mark.parametrize(
    ("where", "score"), [("auto", 1), ("hash", 1), ("boxed", 0), ("tag", 0), ("phrase", 0), ("last", 0)]
)
def test_where_the_answer_stands_is_a_policy(where, score):
    text = "#### 42\n\\boxed{1}\n<answer>2</answer>\nAnswer: 3\n4"
    assert verify("42", text, where=where).score == score
    assert verify("42", "42", where=where).score == (where in ("auto", "last"))


def test_the_grade_says_what_was_read_and_why():
    assert verify("12", "#### 12.50") == Grade(0.0, "wrong", "25/2", "25/2 is not 12.")
    assert verify("12", "?") == Grade(0.0, "no_answer", None, "The reply states no answer that is a number.")


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="gold: 'twelve' is not a number"):
        verify("twelve", "12", kind="number")
    with pytest.raises(SettingError, match="where: unknown value 'box'; did you mean 'boxed'"):
        verify("12", "12", where="box")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "#### {:,}", "Answer: {}.", "\\boxed{{{:,}}}"]))
def test_every_integer_is_read_back_from_every_form(value, form):
    assert verify(value, form.format(value)).status == "correct"
    assert verify(value + 1, form.format(value)).status == "wrong"


@given(st.integers(-(10**9) + 1, 10**9 - 1), st.integers(0, 3), st.sampled_from(["", "."]))
def test_a_number_alone_is_read_as_among_words(number: int, zeros: int, end: str) -> None:
    """There is a shorter way for it."""
    digits = f"{'-' if number < 0 else ''}{'0' * zeros}{abs(number)}"
    alone, among = f"Answer: {digits}{end}", f"Answer: it is {digits}{end}"
    for gold in (str(number), str(number + 1)):
        one, other = verify(gold, alone, kind="number"), verify(gold, among, kind="number")
        assert (one.score, one.status) == (other.score, other.status)
        assert one.score == (gold == str(number))


@given(st.text(max_size=200), st.integers(-99, 99))
def test_any_text_is_graded_without_an_error(text, gold):
    assert verify(gold, text).score in (0.0, 1.0)
    assert verify(gold, f"{text}\n#### {gold}").score == ("<think>" not in text)


@given(st.fractions())
def test_exact_values_compare_exactly(value: Fraction):
    assert parse(str(value)) == value


def test_long_digits_and_deep_braces_cost_little():
    for text in ("9" * 100_000, "\\boxed{" * 5_000, "{" * 50_000, "1," * 50_000, "-" * 50_000, "answer is " * 10_000):
        assert verify("9", text).score == 0.0


BOX = "\\boxed{%s}"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("1/2", BOX % "½"),
        ("3.5", BOX % "3\\frac{1}{2}"),
        ("3.5", "3 1/2"),
        ("1e3", BOX % "1000"),
        ("1000", "1 000"),
        ("90", BOX % "[90]"),
        ("90", BOX % "90^\\circ"),
        ("1.25", "1,25"),
        ("1/3", BOX % "0.3333"),
        ("\\pi", BOX % "3.14159"),
        ("x + 1", "**Answer:** $1 + x$"),
        ("(x-1)(x+1)", BOX % "x² − 1"),
        ("\\frac{\\sqrt{3}}{2}", "The answer is √3/2."),
        ("\\text{east}", "The answer is East."),
        ("\\text{(B)}", "The correct option is (B)."),
        ("B", "Answer: B) 12 cm"),
        ("True", BOX % "\\text{true}"),
        ("10\\text{ cm}", BOX % "10 centimeters"),
        ("10\\text{ cm}", BOX % "10"),
        ("x = 5", BOX % "5"),
        ("[0, 1)", BOX % "[0,1)"),
        ("x < 3", BOX % "(-\\infty, 3)"),
        ("x \\ge 5", "so $5 \\le x$"),
        ("2x + 4y = 3", BOX % "y = -\\frac12 x + \\frac34"),
        ("\\{1, 2\\}", BOX % "2, 1"),
        ("{1, 2, 3}", "{3, 2, 1}"),
        ("{3, 1}", BOX % "{1, 3}"),
        ("1 \\pm \\sqrt 2", BOX % "1-\\sqrt2, 1+\\sqrt2"),
        ("(2, 1), (1, 2)", "\\boxed{(1, 2)} and \\boxed{(2, 1)}"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", BOX % "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
        ("So \\boxed{x^2} it is.", BOX % "x^2"),
        ("\\sqrt 2", "first \\boxed{2}, no, \\boxed{\\sqrt{2}}"),
        ("(1+i)^2", BOX % "2i"),
    ],
)
def test_general_answers_that_are_right(gold, text):
    assert verify(gold, text).status == "correct"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("5", BOX % "5abc"),
        ("6", "x=5 or x=6"),
        ("5", "Answer: 5 or 6"),
        ("6", "<answer>5</answer><answer>6</answer>"),
        ("6", "\\boxed{5} \\boxed{6}"),
        ("5", "#### 5, 6"),
        ("5", BOX % "5=6"),
        ("6", BOX % "2x=6"),
        ("6", BOX % "2 * 3"),
        ("12", BOX % "1 2"),
        ("1", BOX % "1 \\text{ million}"),
        ("12", "\\boxed{12"),
        ("\\cos x = 1", BOX % "\\sin x = 1"),
        ("\\text{east}", BOX % "\\text{northeast}"),
        ("\\text{east}", BOX % "east or west"),
        ("x + 1", BOX % "x + 1 \\text{ or } x + 2"),
        ("x", "|x|"),
        ("5t", BOX % "5"),
        ("R^2", BOX % "r^2"),
        ("\\pi", BOX % "3.14"),
        ("\\pi", BOX % "\\pi + 10^{-20}"),
        ("2^{100} - 2", BOX % "2^{100} + 2"),
        ("(1, 2)", BOX % "[1, 2]"),
        ("(1, 2, 3)", BOX % "(1, 2, 3]"),
        ("[0, 1]", BOX % "[0, 1)"),
        ("x < 5", BOX % "x \\le 5"),
        ("x = 5", BOX % "y = 5"),
        ("10\\text{ cm}", BOX % "10 m"),
        ("\\{1, 2\\}", BOX % "\\{1, 2, 3\\}"),
        ("\\begin{pmatrix} 0 & 0 \\\\ 0 & 0 \\end{pmatrix}", BOX % "\\begin{pmatrix} 0 & 3 \\\\ 0 & 0 \\end{pmatrix}"),
        ("204_5", BOX % "204"),
        ("8:34", BOX % "8:35"),
        ("\\infty", BOX % "-\\infty"),
        ("B", BOX % "A, B"),
    ],
)
def test_general_answers_that_are_wrong(gold, text):
    assert verify(gold, text).score == 0


def test_a_number_may_be_asked_for_as_a_number():
    assert verify("12", BOX % "\\sqrt{144}").status == "correct"
    assert verify("12", BOX % "\\sqrt{144}", kind="number").status == "no_answer"
    with pytest.raises(SettingError, match="kind: unknown value 'numbers'; did you mean 'number'"):
        verify("12", "12", kind="numbers")


def test_bare_lists_keep_their_order_unless_told_otherwise():
    assert verify("1, -2", BOX % "-2, 1").status == "wrong"
    assert verify("1, -2", BOX % "-2, 1", ordered=False).status == "correct"
    assert verify("x = 1, -2", BOX % "-2, 1").status == "correct"


def test_an_empty_reference_is_no_silent_zero():
    assert verify("", "5").status == "no_reference"
