"""The registration table: ids, short ids, vector entry points."""

from __future__ import annotations

import pickle
import sys
from contextlib import closing

import gymnasium
import pytest
from gymnasium.utils.env_checker import data_equivalence

import llm_gym
from llm_gym import envs
from llm_gym.envs import TABLE, resolve
from llm_gym.envs.guess_number import GuessNumber
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
    envs.register_table()
    assert dict(gymnasium.registry) == before


def test_short_and_full_ids_are_one():
    assert resolve("GSM8K-v0") == resolve("llm_gym/GSM8K-v0") == resolve("llm_gym:GSM8K-v0") == "llm_gym/GSM8K-v0"
    assert resolve("CartPole-v1") == "CartPole-v1"


def test_a_module_before_the_colon_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_games.py").write_text(
        "import llm_gym\nllm_gym.register('me/Mine-v0', 'llm_gym.envs.guess_number:GuessNumber', kwargs={'high': 7})\n"
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


@pytest.fixture
def registered():
    yield "me/Own-v0"
    gymnasium.registry.pop("me/Own-v0", None)


def test_a_class_of_your_own_has_the_vector_environment(registered):
    llm_gym.register(registered, GuessNumber, max_episode_steps=1)
    with closing(gymnasium.make_vec(registered, num_envs=2, high=9)) as venv:
        assert isinstance(venv, TextVectorEnv)
        venv.reset(seed=1)
        *_, truncated, _ = venv.step([envs.make(registered).unwrapped.chat.encode_reply("none")] * 2)
        assert truncated.tolist() == [True, True]


def test_wrappers_around_each_environment_leave_gymnasiums_own(registered):
    wrapper = gymnasium.wrappers.RecordEpisodeStatistics.wrapper_spec()
    llm_gym.register(registered, GuessNumber, additional_wrappers=(wrapper,))
    with closing(gymnasium.make_vec(registered, num_envs=2)) as venv:
        assert isinstance(venv, gymnasium.vector.SyncVectorEnv)


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("Dataset-v0", "OpenEnv-v0")])
def test_processes_of_their_own_play_the_same_episodes(name):
    """Through the memory that they share, which is Gymnasium's default."""
    options = {"dataset": "sample"} if name == "GSM8K-v0" else {}
    modes = ("async", "sync")
    venvs = [gymnasium.make_vec(f"llm_gym/{name}", 2, vectorization_mode=mode, **options) for mode in modes]
    chat = venvs[1].envs[0].unwrapped.chat
    try:
        for seed in (1, 2):
            played = [[venv.reset(seed=seed)] for venv in venvs]
            for text in ("50", "Answer: 42", "25", "7"):
                for venv, out in zip(venvs, played, strict=True):
                    out.append(venv.step((chat.encode_reply(text), chat.encode_reply("75"))))
                    assert isinstance(out[-1][0], tuple)
                    assert out[-1][0] in venv.observation_space
            assert data_equivalence(*played, exact=True)
    finally:
        for venv in venvs:
            venv.close()


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


def test_an_unknown_environment_is_told_of_none_without_text():
    with pytest.raises(SettingError, match="valid: Arithmetic-v0, .*") as error:
        resolve("X=1")
    assert "CartPole" not in str(error.value)
