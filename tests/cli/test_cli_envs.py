from __future__ import annotations

from click.testing import CliRunner

from llm_gym.cli.group import llmgym
from llm_gym.envs import TABLE


def said(*words: str) -> str:
    done = CliRunner().invoke(llmgym, ["envs", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_lists_every_environment() -> None:
    text = said()
    assert all(name in text and line in text for name, (_, line) in TABLE.items())


def test_describes_arguments_of_the_class_and_its_parents() -> None:
    text = said("Arithmetic-v0")
    assert "digits_max" in text
    assert "[2]  most digits of an operand." in text
    assert "max_context" in text
    assert "tokens of context" in text
    assert "Unseen problems: split=test" in text


def test_the_example_is_a_real_episode() -> None:
    text = said("GuessNumber-v0", "--env-arg", "low=7", "--env-arg", "high=7", "--say", "I say 7")
    assert "[user] Guess my number from 7 to 7." in text
    assert "[assistant] I say 7" in text
    assert "reward 1, answered" in text


def test_what_an_example_needs() -> None:
    assert "needs dataset" in said("Dataset-v0")


def test_data_that_ships_is_the_example() -> None:
    assert "[user]" in said("GSM8K-v0")
