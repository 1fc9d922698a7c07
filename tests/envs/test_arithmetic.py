"""Arithmetic-v0: the problems, their splits, the grading."""

from __future__ import annotations

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.envs import make
from llm_gym.envs.arithmetic import OPERATIONS, Arithmetic, Problem, split_of, worked
from llm_gym.errors import ConfigError

TWO_DIGITS = [Problem(a, "+", b) for a, b in itertools.product(range(10, 100), repeat=2)]


def answer(env, text):
    return env.step(env.unwrapped.chat.encode_reply(text))


def test_the_default_task_is_two_digit_addition():
    env = make("Arithmetic-v0")
    for seed in range(50):
        _, info = env.reset(seed=seed)
        a, b = env.unwrapped.problem.a, env.unwrapped.problem.b
        assert info["messages"] == [{"role": "user", "content": f"What is {a} + {b}?"}]
        assert 10 <= min(a, b) <= max(a, b) <= 99
        _, reward, terminated, _, info = answer(env, f"Answer: {a + b}")
        assert (reward, terminated, info["rewards"]) == (1.0, True, {"correct": 1.0})


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("7+8=15, 4+3+1=8. Answer: 85", True),
        ("85", True),
        ("It is 85.", True),
        ("Answer: 85.0", True),
        ("Answer: 84. Answer: 85", True),
        ("Answer: 85. Answer: 84", False),
        ("85 is 47+38=84", False),
        ("Answer: 850", False),
        ("Answer: 85x", False),
        ("Answer: -85", False),
        ("Answer: 8 5", False),
        ("", False),
    ],
)
def test_only_the_exact_answer_counts(reply, right):
    env = Arithmetic(split="all")
    for task in range(1000):
        env.reset(seed=0, options={"task": task})
        if env.problem.answer == 85:
            break
    assert env.problem.answer == 85
    assert answer(env, reply)[1] == float(right)


def test_one_problem_in_ten_is_unseen_and_no_pair_of_unit_digits_is_missing():
    by_units = collections.defaultdict(list)
    for problem in TWO_DIGITS:
        by_units[problem.a % 10, problem.b % 10].append(split_of(problem))
    share = sum(s.count("test") for s in by_units.values()) / len(TWO_DIGITS)
    assert 0.08 < share < 0.12
    assert len(by_units) == 100
    assert all(0 < s.count("train") / len(s) >= 0.6 and "test" in s for s in by_units.values())


def test_the_split_does_not_move():
    """Corpora and checkpoints depend on it."""
    assert sum(split_of(p) == "test" for p in TWO_DIGITS) == 802
    assert [split_of(p) for p in TWO_DIGITS[:5]] == ["train", "train", "test", "test", "train"]
    assert split_of((11, "+", 76)) == split_of((76, "+", 11))


@given(st.integers(0, 10**9), st.sampled_from("+*"), st.integers(0, 10**9))
def test_swapping_operands_does_not_make_a_problem_unseen(a, op, b):
    assert split_of((a, op, b)) == split_of((b, op, a))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_holds_only_its_own_problems(split):
    env = Arithmetic(split=split, operations="+-*", digits_min=1, digits_max=4)
    for seed in range(200):
        env.reset(seed=seed)
        assert split_of(env.problem) == split


def test_the_knobs_bound_the_problems():
    env = Arithmetic(operations="-*", digits_min=2, digits_max=3, split="all")
    problems = [env.reset(seed=s) and env.problem for s in range(300)]
    assert {p.op for p in problems} == {"-", "*"}
    assert {len(str(n)) for p in problems for n in (p.a, p.b)} == {2, 3}
    assert all(p.answer >= 0 for p in problems)


def test_a_worked_example_is_from_the_training_split_and_right():
    env = Arithmetic(split="test", worked_example=True)
    _, info = env.reset(seed=3)
    question, example = info["messages"][0]["content"].split("\n")
    a, b = (int(word) for word in example.split("?")[0].split() if word.isdigit())
    assert question == env.problem.question
    assert example == f"Work like this: What is {a} + {b}? {worked((a, '+', b))}"
    assert split_of((a, "+", b)) == "train"


@given(st.integers(0, 10**12), st.sampled_from("+-*"), st.integers(0, 10**12))
def test_worked_solutions_are_right_in_every_column(a, op, b):
    steps, _, result = worked((a, op, b)).rpartition("Answer: ")
    assert int(result) == OPERATIONS[op](a, b)
    for equation in steps.strip(" .").split(", ") if steps else ():
        left, right = equation.split("=")
        assert sum(int(n) for n in left.split("+")) == int(right)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"operations": "+/"}, "operations: unknown value '/'"),
        ({"operations": ""}, "operations: unknown value ' '"),
        ({"split": "tset"}, "split: unknown value 'tset'; did you mean 'test'"),
        ({"digits_min": 3}, "digits_min, digits_max: got 3 and 2"),
    ],
)
def test_bad_knobs_are_refused(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        Arithmetic(**kwargs)
