"""The registration table: ids, short ids, vector entry points."""

from __future__ import annotations

import pickle
import sys

import gymnasium
import pytest

from llm_gym import envs
from llm_gym.envs import TABLE, resolve
from llm_gym.errors import SettingError
from llm_gym.vector import TextVectorEnv


@pytest.mark.parametrize("name", TABLE)
def test_every_row_is_registered_as_strings(name):
    spec = gymnasium.spec(f"llm_gym/{name}")
    assert isinstance(spec.entry_point, str)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()) == spec


def test_registering_twice_changes_nothing():
    before = dict(gymnasium.registry)
    envs.register()
    assert dict(gymnasium.registry) == before


def test_short_and_full_ids_are_one():
    assert resolve("GSM8K-v0") == resolve("llm_gym/GSM8K-v0") == resolve("llm_gym:GSM8K-v0") == "llm_gym/GSM8K-v0"
    assert resolve("CartPole-v1") == "CartPole-v1"


def test_a_module_before_the_colon_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_games.py").write_text(
        "import gymnasium\ngymnasium.register('me/Mine-v0', 'llm_gym.envs.guess_number:GuessNumber',\n"
        "    kwargs={'high': 7}, vector_entry_point='llm_gym.vector:me/Mine-v0')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert resolve("my_games:me/Mine-v0") == "me/Mine-v0"
        assert "7" in envs.make("my_games:me/Mine-v0").reset(seed=1)[1]["messages"][0]["content"]
        venv = gymnasium.make_vec("me/Mine-v0", num_envs=2)
        assert isinstance(venv, TextVectorEnv)
        assert venv.envs[0].unwrapped.high == 7
        venv.close()
    finally:
        gymnasium.registry.pop("me/Mine-v0", None)
        sys.modules.pop("my_games", None)


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("GSM8k-v0", "env: unknown value 'GSM8k-v0'; did you mean 'GSM8K-v0'"),
        ("llm_gym/Arithmatic-v0", "did you mean 'llm_gym/Arithmetic-v0'"),
        ("no_such_module:me/X-v0", "env: cannot import 'no_such_module' of 'no_such_module:me/X-v0'"),
    ],
)
def test_an_unknown_id_names_the_nearest(env_id, words):
    with pytest.raises(SettingError, match=words):
        resolve(env_id)


def test_the_vector_entry_point_is_a_name_and_nothing_else():
    import llm_gym.vector

    with pytest.raises(AttributeError, match="has no attribute 'llm_gym/Nothing-v0'"):
        getattr(llm_gym.vector, "llm_gym/Nothing-v0")
