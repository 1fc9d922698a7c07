"""Dataset-v0: data and rewards by name."""

from __future__ import annotations

import json
import sys

import pytest

from llm_gym.envs.dataset import Dataset
from llm_gym.errors import ConfigError, DataError, RewardError

ROWS = [{"prompt": "Say one.", "want": "one"}, {"prompt": "Say two.", "want": "two"}]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def right(text, row):
    return row["want"] in text


def short(text, row):
    return 1.0 if len(text) < 10 else 0.0


def both(text, row):
    return {"right": right(text, row), "short": short(text, row)}


def answer(env, text, row=0):
    env.reset(options={"task": row})
    return env.step(env.chat.encode_reply(text))


def test_a_function_by_import_path_scores_the_row(data, tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text("def score(text, row):\n    return float(text == row['want'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = Dataset(dataset=data, reward="my_scores:score")
        assert [answer(env, word, row)[1] for word in ("one", "two") for row in (0, 1)] == [1, 0, 0, 1]
        assert answer(env, "one")[4]["rewards"] == {"reward": 1.0}
    finally:
        sys.modules.pop("my_scores", None)


@pytest.mark.parametrize("reward", [both, [right, short], {"right": right, "short": short}, {"x": both}])
def test_named_rewards_in_every_form(data, reward):
    env = Dataset(dataset=data, reward=reward, reward_weights={"short": 0.5})
    _, total, terminated, _, info = answer(env, "one")
    assert (total, terminated, info["rewards"]) == (1.5, True, {"right": 1.0, "short": 1.0})
    assert answer(env, "it is surely two")[1] == 0.0


def test_a_prompt_may_be_a_chat(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"chat": chat}]))
    env = Dataset(dataset=str(tmp_path / "chat.json"), reward=short, prompt="chat")
    assert env.reset(seed=1)[1]["messages"] == chat
    env.step(env.chat.encode_reply("x"))
    assert env.reset(seed=1)[1]["messages"] == chat


def test_a_prompt_of_another_kind_is_refused(tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps([{"prompt": 7}]))
    with pytest.raises(DataError, match="prompt: column 'prompt' holds 7, want a string or a list of messages"):
        Dataset(dataset=str(tmp_path / "odd.json"), reward=short).reset(seed=1)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("my_pkg.score", "reward: got 'my_pkg.score', want 'package.module:function'"),
        ("no_such_pkg:score", "reward: cannot import 'no_such_pkg'"),
        ("json:dmups", "reward: unknown value 'dmups'; did you mean 'dumps'"),
        ([short, short], "reward: got functions named \\['short', 'short'\\]"),
        ([], "reward: got functions named \\[\\]"),
    ],
)
def test_bad_reward_functions_are_found_at_the_start(data, reward, words):
    with pytest.raises(ConfigError, match=words):
        Dataset(dataset=data, reward=reward)


def test_a_missing_column_names_the_nearest(data):
    with pytest.raises(DataError, match="prompt: unknown value 'promt'; did you mean 'prompt'"):
        Dataset(dataset=data, reward=short, prompt="promt")


def test_a_component_given_twice_is_refused(data):
    env = Dataset(dataset=data, reward={"right": short, "all": both})
    with pytest.raises(RewardError, match="two reward functions give the component 'right'"):
        answer(env, "one")


def forgetful(text, row):
    return None


def fragile(text, row):
    return row["no such column"]


def test_a_reward_that_is_no_number_names_the_function_the_environment_and_the_episode(data):
    env = Dataset(dataset=data, reward=forgetful)
    with pytest.raises(
        RewardError, match="Dataset: reward component 'reward' of function 'forgetful' is None at task 0"
    ):
        answer(env, "one")
    env.reset(seed=7)
    with pytest.raises(RewardError, match="at seed 7, want a finite number"):
        env.step(env.chat.encode_reply("one"))


def test_a_reward_function_that_raises_is_named_too(data):
    env = Dataset(dataset=data, reward=[right, fragile])
    env.reset(seed=7)
    said = "Dataset: reward function 'fragile' raised KeyError: 'no such column' at seed 7."
    with pytest.raises(RewardError, match=said) as caught:
        env.step(env.chat.encode_reply("one"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert env.reset(seed=8)[0].size  # and the environment goes on


def test_a_column_of_answers_is_graded_without_a_reward_function(tmp_path):
    path = tmp_path / "maths.jsonl"
    answers = ["\\\\frac{1}{2}", "x^2 - 1", "so it is \\\\boxed{(1, 2)}."]
    path.write_text("".join(f'{{"problem": "?", "answer": "{text}"}}\n' for text in answers))
    env = Dataset(dataset=str(path), prompt="problem")
    assert env.metadata["blocking"]
    assert not Dataset.metadata["blocking"]
    for row, right in enumerate(["\\boxed{0.5}", "Answer: $(x-1)(x+1)$", "<answer>(1,2)</answer>"]):
        assert answer(env, right, row)[4]["rewards"] == {"correct": 1.0}
        assert answer(env, right, (row + 1) % 3)[1] == 0.0
    with pytest.raises(DataError, match="answer: row 1 of .* has 'x.2 - 1', want a number"):
        Dataset(dataset=str(path), prompt="problem", reward="number")
    with pytest.raises(DataError, match="answer: unknown value 'answers'; did you mean 'answer'"):
        Dataset(dataset=str(path), prompt="problem", answer="answers")


def test_rows_without_an_answer_are_reported(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text('{"prompt": "?", "answer": "1"}\n{"prompt": "?", "answer": null}\n')
    with pytest.warns(UserWarning, match="1 of 2 rows of .* state none \\(row 1 first\\)"):
        env = Dataset(dataset=str(path))
    assert answer(env, "1", 0)[1] == 1.0
    assert answer(env, "None", 1)[1] == 0.0
    path.with_name("none.jsonl").write_text('{"prompt": "?", "answer": ""}\n')
    with pytest.raises(DataError, match="no row of .* has an answer in column 'answer'"):
        Dataset(dataset=str(path.with_name("none.jsonl")))


def test_the_answers_of_math_are_right_and_their_neighbours_wrong(shared):
    file = shared("data/math/math500/math.json")
    env = Dataset(dataset=str(file), prompt="problem", max_tokens=1000)
    rows = [row["answer"] for row in json.loads(file.read_text("utf-8"))]
    for task in range(0, len(rows), 25):
        assert answer(env, f"Thus $\\boxed{{{rows[task]}}}$.", task)[1] == 1.0
        assert answer(env, f"Thus $\\boxed{{{rows[task]} + 1}}$.", task)[1] == 0.0
