"""The vector environment: equal to Gymnasium's own, in every autoreset mode; and send/recv."""

from __future__ import annotations

import threading

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from llm_gym import Reply, TextEnv, TextVectorEnv
from llm_gym.envs import TABLE
from llm_gym.errors import ConfigError
from llm_gym.testing import WORDS


def reward(text, row):
    return {"length": float(len(text)), "even": len(text) % 2 == 0}


ARGS = {
    "Gymnasium-v0": {"max_turns": 3},
    "TextArena-v0": {"max_turns": 3},
    "GSM8K-v0": {"dataset": "sample"},
    "GuessNumber-v0": {"high": 60, "max_turns": 3},
    "Dataset-v0": {"reward": reward, "prompt": "question"},
}
COUNT = 3
MODES = list(AutoresetMode)


@pytest.fixture
def args(request, tmp_path):
    given = dict(ARGS.get(request.getfixturevalue("name"), {}))
    if "reward" in given:
        given["dataset"] = str(tmp_path / "qa.jsonl")
        (tmp_path / "qa.jsonl").write_text('{"question": "one?"}\n{"question": "two?"}\n{"question": "three?"}\n')
    return given


def replies(chat, step):
    rng = np.random.default_rng(step)
    return tuple(chat.encode_reply(WORDS[rng.integers(len(WORDS))]) for _ in range(COUNT))


def drive(venv, chat, mode, steps=8):
    """Everything a vector environment returns in some steps, ended environments reset as its mode wants."""
    out = [venv.reset(seed=[11, 5, 8])]
    for step in range(steps):
        out.append(venv.step(replies(chat, step)))
        ended = out[-1][2] | out[-1][3]
        if mode is AutoresetMode.DISABLED and ended.any():
            out.append(venv.reset(seed=[step + 100] * COUNT, options={"reset_mask": ended}))
    venv.close()
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name, (entry, _) in TABLE.items() if ".adapters." not in entry])
def test_ours_equals_gymnasiums_step_for_step(name, mode, args):
    env_id = f"llm_gym/{name}"

    def one():
        import llm_gym  # noqa: F401  (in a fresh process: it registers the ids)

        return gymnasium.make(env_id, **args)

    ours = gymnasium.make_vec(env_id, num_envs=COUNT, autoreset_mode=mode, **args)
    assert isinstance(ours, TextVectorEnv)
    assert (ours.spec.id, ours.metadata["autoreset_mode"]) == (env_id, mode)
    chat = ours.envs[0].unwrapped.chat
    got = drive(ours, chat, mode)
    assert any((step[2] | step[3]).any() for step in got if len(step) == 5)
    # A fork beside the thread of an MCP session may come while it holds a lock, which nobody then gives back.
    context = "forkserver" if name == "MCPTool-v0" else None
    others = (
        SyncVectorEnv([one] * COUNT, autoreset_mode=mode),
        AsyncVectorEnv([one] * COUNT, context=context, autoreset_mode=mode, shared_memory=False),
    )
    for other in others:
        assert (ours.observation_space, ours.action_space) == (other.observation_space, other.action_space)
        want = drive(other, chat, mode)
        for step, (a, b) in enumerate(zip(got, want, strict=True)):
            assert data_equivalence(a, b, exact=True), (type(other).__name__, step, a, b)


def test_the_last_observation_and_info_survive_a_reset_in_the_same_step():
    venv = TextVectorEnv("llm_gym/Arithmetic-v0", 2, autoreset_mode="SameStep")
    first, _ = venv.reset(seed=1)
    chat = venv.envs[0].unwrapped.chat
    action = chat.encode_reply("Answer: 1")
    obs, _, terminated, _, infos = venv.step([action, action])
    assert terminated.all()
    for i in range(2):
        assert np.array_equal(infos["final_obs"][i], np.concatenate([first[i], action]))
        assert infos["final_info"]["messages"][i][-1] == {"role": "assistant", "content": "Answer: 1"}
        assert infos["messages"][i][-1]["role"] == "user"
        assert not np.array_equal(obs[i], first[i])
    venv.close()


def test_seeds_are_counted_up_or_listed():
    venv = TextVectorEnv("llm_gym/Arithmetic-v0", 3)
    counted, _ = venv.reset(seed=5)
    listed, _ = venv.reset(seed=[5, 6, 7])
    assert data_equivalence(counted, listed)
    grouped, _ = venv.reset(seed=[5, 5, 5])
    assert data_equivalence(grouped[0], grouped[2])
    with pytest.raises(ValueError, match="seed: got 2 seeds, want one for each of 3"):
        venv.reset(seed=[1, 2])
    venv.close()


def test_the_caller_owns_what_it_gets():
    venv = TextVectorEnv("llm_gym/GuessNumber-v0", 2)
    obs, _ = venv.reset(seed=5)
    kept = obs[0].copy()
    obs[0][:] = 0
    action = venv.envs[0].unwrapped.chat.encode_reply("1000")
    after, *_ = venv.step([action, action])
    assert np.array_equal(after[0][: len(kept)], kept)
    options = {"reset_mask": np.array([True, False])}
    venv.reset(options=options)
    assert list(options) == ["reset_mask"]
    venv.close()


@pytest.mark.parametrize("mask", [np.zeros(2, np.bool_), np.ones(3, np.bool_), [True, False], np.ones(2)])
def test_a_bad_mask_is_refused(mask):
    venv = TextVectorEnv("llm_gym/Arithmetic-v0", 2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match=r"reset_mask.*want a bool array of shape \(2,\)"):
        venv.reset(options={"reset_mask": mask})
    venv.close()


def test_a_mask_before_the_first_reset_is_refused():
    venv = TextVectorEnv("llm_gym/Arithmetic-v0", 2)
    with pytest.raises(gymnasium.error.ResetNeeded, match="never reset"):
        venv.reset(options={"reset_mask": np.array([True, False])})
    venv.close()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_envs": 0}, "num_envs: got 0"),
        ({"autoreset_mode": "SameStop"}, "autoreset_mode: unknown value 'SameStop'; did you mean 'SameStep'"),
        ({"spilt": "test"}, "unknown value 'spilt'; did you mean 'split'"),
    ],
)
def test_bad_arguments_are_refused(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        TextVectorEnv("llm_gym/Arithmetic-v0", **{"num_envs": 1, **kwargs})


class Waiting(TextEnv):
    """Blocks in `reply` until its gate opens; "boom" raises."""

    metadata = {**TextEnv.metadata, "blocking": True}  # noqa: RUF012
    gates: dict[str, threading.Event] = {}  # noqa: RUF012

    def open(self):
        return [{"role": "user", "content": "go"}]

    def reply(self, text):
        if text == "boom":
            raise RuntimeError("boom")
        assert self.gates[text].wait(60)
        return Reply(reward=1.0, done=True)


def test_no_one_waits_for_the_slowest():
    Waiting.gates = {"slow": threading.Event(), "fast": threading.Event()}
    Waiting.gates["fast"].set()
    before = set(threading.enumerate())
    venv = TextVectorEnv(Waiting, 3)
    venv.reset(seed=1)
    encode = venv.envs[0].chat.encode_reply
    venv.send([encode("slow"), encode("fast"), encode("fast")], [0, 1, 2])
    fast = set()
    while len(fast) < 2:
        fast |= {(r.index, r.reward, r.terminated) for r in venv.recv()}
    assert fast == {(1, 1.0, True), (2, 1.0, True)}
    with pytest.raises(TimeoutError, match="No environment finished"):
        venv.recv(timeout=0.01)
    with pytest.raises(ValueError, match="environment 0 has a step under way"):
        venv.send([encode("fast")], [0])
    with pytest.raises(ValueError, match=r"step\(\) was called with steps under way in \[0\]"):
        venv.step([encode("fast")] * 3)
    Waiting.gates["slow"].set()
    assert [r.index for r in venv.recv()] == [0]
    venv.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("llm_gym-env") and t not in before]


@pytest.mark.parametrize("error", [SystemExit, StopIteration, GeneratorExit])
def test_whatever_a_blocking_environment_raises_ends_its_step(error, monkeypatch):
    venv = TextVectorEnv(Waiting, 1)
    venv.reset(seed=1)

    def boom(self, action):
        raise error

    monkeypatch.setattr(Waiting, "step", boom)
    venv.send([np.array([1], np.int32)], [0])
    with pytest.raises(error):
        venv.recv(timeout=30)
    venv.close()


def test_one_environments_error_does_not_touch_the_others():
    Waiting.gates = {"fast": threading.Event()}
    Waiting.gates["fast"].set()
    venv = TextVectorEnv(Waiting, 2)
    venv.reset(seed=1)
    encode = venv.envs[0].chat.encode_reply
    venv.send([encode("boom"), encode("fast")], [0, 1])
    seen = []
    while len(seen) < 2:
        try:
            seen += [r.index for r in venv.recv()]
        except RuntimeError as error:
            seen.append(str(error))
    assert sorted(map(str, seen)) == ["1", "boom"]
    venv.close()


@pytest.mark.parametrize("mode", MODES)
def test_send_and_recv_follow_the_autoreset_mode(mode):
    venv = TextVectorEnv("llm_gym/Arithmetic-v0", 2, autoreset_mode=mode)
    first, _ = venv.reset(seed=1)
    action = venv.envs[0].unwrapped.chat.encode_reply("Answer: 1")
    venv.send([action], [1])
    (result,) = venv.recv()
    assert (result.index, result.terminated) == (1, True)
    if mode is AutoresetMode.SAME_STEP:
        assert np.array_equal(result.info["final_obs"], np.concatenate([first[1], action]))
    else:
        assert np.array_equal(result.obs, np.concatenate([first[1], action]))
    venv.send([action], [1])
    if mode is AutoresetMode.DISABLED:
        with pytest.raises(gymnasium.error.ResetNeeded, match="Environment 1 ended"):
            venv.recv()
    else:
        (again,) = venv.recv()
        assert again.terminated is (mode is AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="no step under way"):
        venv.recv()
    with pytest.raises(ValueError, match="indices: got 2, want 0 to 1"):
        venv.send([action], [2])
    venv.close()


def test_lockstep_steps_blocking_environments_together():
    """Each waits for the other: in turn, they would never finish."""
    both = threading.Barrier(2, timeout=60)

    class Meeting(Waiting):
        def reply(self, text):
            both.wait()
            return Reply(done=True)

    venv = TextVectorEnv(Meeting, 2)
    venv.reset(seed=1)
    action = venv.envs[0].chat.encode_reply("x")
    assert venv.step([action, action])[2].all()
    venv.close()
