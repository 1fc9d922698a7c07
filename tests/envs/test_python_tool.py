"""`PythonTool-v0`: episodes with an interpreter of their own."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from llm_gym.envs import make
from llm_gym.envs.tools.python_tool import PythonTool
from llm_gym.errors import ConfigError, DataError, SettingError
from llm_gym.testing import check_environment

BACKENDS = ("worker", "jupyter")


def say(env: PythonTool, text: str) -> tuple[float, dict[str, Any]]:
    _, reward, _, _, info = env.step(env.chat.encode_reply(text))
    return reward, info


def run(env: PythonTool, code: str) -> str:
    return str(say(env, env.call_text("python", code=code))[1]["messages"][-1]["content"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_computed_is_right(backend: str) -> None:
    with closing(gymnasium.make("llm_gym/PythonTool-v0", backend=backend).unwrapped) as env:
        assert isinstance(env, PythonTool)
        _, info = env.reset(seed=4)
        (schema,) = info["tools"]
        assert schema["function"]["name"] == "python"
        assert schema["function"]["parameters"]["required"] == ["code"]
        expression = info["messages"][0]["content"].removeprefix("What is ").removesuffix("?")
        answer = run(env, f"x = {expression}\nprint(x)")
        assert run(env, "x") == answer, "variables live from call to call"
        reward, info = say(env, f"Answer: {answer}")
        assert reward == 1.0
        assert info["rewards"] == {"correct": 1.0, "format": 0.0, "tool_calls": 2.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_episodes_share_nothing(backend: str) -> None:
    with closing(PythonTool(backend=backend)) as one, closing(PythonTool(backend=backend)) as two:
        for env in (one, two):
            env.reset(seed=0)
        assert run(one, "x = 7; open('note', 'w').write('here')") == "4"
        assert "NameError" in run(two, "x")
        assert "FileNotFoundError" in run(two, "open('note')")
        one.reset(seed=0)
        assert "NameError" in run(one, "x")
        assert "FileNotFoundError" in run(one, "open('note')")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_that_never_ends_is_answered(backend: str) -> None:
    with closing(PythonTool(backend=backend, call_timeout=0.5)) as env:
        env.reset(seed=0)
        assert "after 0.5 s" in run(env, "while True: pass")
        env.call_timeout = 60
        assert run(env, "print(6 * 7)") == "42"


def test_the_answer_and_the_data_are_out_of_reach(tmp_path: Path) -> None:
    secret = "the-reference-is-918273"
    data = tmp_path / "qa.jsonl"
    data.write_text(json.dumps({"question": "How many?", "answer": secret}) + "\n")
    with closing(PythonTool(dataset=str(data))) as env:
        env.reset(seed=0)
        assert "Error" in run(env, f"open({str(data)!r}).read()")
        assert secret not in run(env, "import os; print(os.environ, os.listdir('/proc'))")
        assert say(env, f"Answer: {secret}")[0] == 1.0


def test_an_expression_is_no_answer() -> None:
    with closing(PythonTool()) as env:
        _, info = env.reset(seed=0)
        expression = info["messages"][0]["content"].removeprefix("What is ").removesuffix("?")
        assert say(env, f"Answer: {expression}")[0] == 0.0


def test_it_conforms() -> None:
    check_environment("PythonTool-v0")
    with closing(gymnasium.make("llm_gym/PythonTool-v0")) as env:
        check_env(env.unwrapped)


def test_mathematics_from_a_data_set(shared: Any) -> None:
    path = shared("data/math/math500/math.json")
    with closing(PythonTool(dataset=str(path), question="problem", answer="answer")) as env:
        _, info = env.reset(seed=0, options={"task": 0})
        assert env.num_tasks
        assert len(info["messages"][0]["content"]) > 10
        assert run(env, "from sympy import sqrt; sqrt(8)") == "2*sqrt(2)"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"backend": "jupiter"}, ConfigError, "did you mean 'jupyter'"),
        ({"sandbox": "requird"}, SettingError, "did you mean 'required'"),
        ({"digits_min": 5, "digits_max": 4}, ConfigError, "digits_min"),
        ({"dataset": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"memory": 0}, SettingError, "memory"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make("PythonTool-v0", **arguments)
