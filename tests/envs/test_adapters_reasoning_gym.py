"""reasoning-gym's data sets as environments; all of them: benchmarks/adapters.py."""

from __future__ import annotations

import inspect
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_gym import check_environment
from llm_gym.envs import make
from llm_gym.envs.adapters.answers import ALGEBRA, ARITHMETIC, LITERALS
from llm_gym.errors import ConfigError


def answered(answer: str | None, row: int = 0, **kwargs: Any) -> tuple[float, str, str]:
    """(reward, stop reason, error) of an answer (None: the data set's own) to a row."""
    env: Any = make("ReasoningGym-v0", max_tokens=2000, **kwargs).unwrapped
    env.reset(seed=0, options={"task": row})
    said = env.entry["answer"] if answer is None else answer
    _, reward, *_, info = env.step(env.chat.encode_reply(f"Well: <answer>7</answer> no, <answer>{said}</answer>"))
    return reward, str(info["stop_reason"]), info.get("error", "")


@pytest.mark.parametrize("name", ["prime_factorization", "pool_matrix", "n_queens"])
def test_a_sample_conforms(name: str) -> None:
    """`pool_matrix` draws from numpy's global generator; a scorer of `prime_factorization` raises on most replies."""
    before = random.getstate()
    check_environment("ReasoningGym-v0", name=name)
    assert random.getstate() == before


def test_the_sets_own_answer_is_right_and_no_answer_earns_nothing() -> None:
    for name in ("chain_sum", "countdown", "number_format", "n_queens"):
        assert answered(None, name=name) == (1.0, "answered", "")
        assert answered(" ", name=name) == (0.0, "answered", "")
    env: Any = make("ReasoningGym-v0").unwrapped
    for text in ("", "{}", "</answer>{}<answer>", "<answer>{}"):
        env.reset(seed=1)
        reward = env.step(env.chat.encode_reply(text.format(env.entry["answer"])))[1]
        assert reward == 0, text


def test_a_scorer_that_raises_on_the_reply_gives_0_and_is_counted() -> None:
    reward, stop, error = answered("about five", name="prime_factorization")
    assert (reward, stop) == (0.0, "bad_reply")
    assert "ValueError: invalid literal" in error


@pytest.mark.parametrize("name", sorted(LITERALS | ARITHMETIC | ALGEBRA))
def test_no_scorer_runs_what_the_policy_writes(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "written"
    for text in (f"open({str(trace)!r}, 'w')", f"[open({str(trace)!r}, 'w')]", "9**9**9**9", "exit()"):
        assert answered(text, name=name)[0] <= 0.01
    assert not trace.exists()
    assert answered(None, row=2, name=name)[0] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        *("x.diff()", "x.__class__", "(9**9)**(9**9)", "((x**9)**9)**9", "exp(exp(exp(x)))", "Integral(x, x)", "f(x)"),
        *("(x + 1)**40*(x + 2)**40", "x" * 500, "+".join("1" * 300), "lambda: 1", "[x]", "'x'"),
    ],
)
def test_algebra_of_other_kinds_or_sizes_is_refused(text: str) -> None:
    assert answered(text, name="simple_integration")[1] == "bad_reply"


def test_every_data_set_that_evaluates_text_is_known() -> None:
    """A new version of the package may bring another."""
    import reasoning_gym

    own = {  # of their own text, never of an answer
        "basic_arithmetic", "bf", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic",
    }  # fmt: skip
    found = set()
    for name, (kind, _) in reasoning_gym.factory.DATASETS.items():
        source = inspect.getsource(sys.modules[kind.__module__])
        if re.search(r"\b(eval|exec|parse_expr|sympify|compile)\(", re.sub(r"re\.compile", "", source)):
            found.add(name)
    assert found == LITERALS | ARITHMETIC | ALGEBRA | own


def test_partial_credit_can_be_cut_off() -> None:
    env: Any = make("ReasoningGym-v0", name="string_insertion").unwrapped
    env.reset(options={"task": 0})
    listed = str(list(env.entry["answer"]))
    assert answered(listed, name="string_insertion")[0] == 0.1
    assert answered(listed, name="string_insertion", threshold=0.5)[0] == 0.0
    assert answered(None, name="string_insertion", threshold=1)[0] == 1.0


def test_rows_are_problems_and_splits_share_none_by_their_seeds() -> None:
    envs: Any = {split: make("ReasoningGym-v0", split=split, size=50).unwrapped for split in ("train", "test")}
    asked = {
        split: [env.reset(options={"task": row})[1]["messages"][0]["content"] for row in range(50)]
        for split, env in envs.items()
    }
    assert len(set(asked["train"])) == 50
    assert not set(asked["train"]) & set(asked["test"])
    assert envs["train"].num_tasks == 50
    assert envs["train"].eval_args == {"split": "test"}


def test_a_data_set_is_made_once() -> None:
    one, two, other = (make("ReasoningGym-v0", config=c).unwrapped for c in ({}, {}, {"min_terms": 3}))
    assert one.data is two.data  # type: ignore[attr-defined]
    assert one.data is not other.data  # type: ignore[attr-defined]


def test_difficulty_is_a_level_or_settings() -> None:
    def terms(**kwargs: Any) -> int:
        env: Any = make("ReasoningGym-v0", **kwargs).unwrapped
        return max(len(env.data[row]["metadata"]["expression"].split()) for row in range(20)) // 2 + 1

    assert terms(level=0) < terms(level=3) < terms(level=3, config={"min_terms": 30, "max_terms": 30}) == 30


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"name": "chain_sums"}, "name: unknown value 'chain_sums'; did you mean 'chain_sum'"),
        ({"name": "composite"}, "name: 'composite' mixes other data sets"),
        ({"config": {"min_term": 3}}, "config of chain_sum: unknown value 'min_term'; did you mean 'min_terms'"),
        ({"config": {"seed": 3}}, "config of chain_sum: unknown value 'seed'"),
        ({"config": {"min_terms": 9, "max_terms": 2}}, "name: 'chain_sum' refuses .* AssertionError"),
        ({"level": 99}, "level: got 99, want 0 to"),
        ({"name": "acre", "level": 0}, "level: 'acre' has no curriculum; use config"),
        ({"config": {"min_terms": object()}}, "config: got .* want names and plain values"),
    ],
)
def test_what_cannot_be_is_one_sentence(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make("ReasoningGym-v0", **kwargs)
