"""TextEnv: contexts, rewards, limits, and refusals."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded

import llm_gym
from llm_gym import Reply, StopReason, TextEnv
from llm_gym.errors import ConfigError, LLMGymError, RewardError, SettingError


class Scripted(TextEnv):
    """Gives the replies it was made with, one a turn."""

    def __init__(self, *replies: Reply, **kwargs):
        super().__init__(**kwargs)
        self.replies = replies

    def open(self):
        self.heard = []
        return [{"role": "user", "content": f"task {self.draw_task(1000)}"}]

    def reply(self, text):
        self.heard.append(text)
        return self.replies[len(self.heard) - 1]


GO_ON = Reply(messages=[{"role": "user", "content": "go on"}])
DONE = Reply(done=True, reward=1.0)


def say(env, text):
    return env.step(env.unwrapped.chat.encode_reply(text))


def test_a_context_is_the_chat_as_the_template_renders_it():
    env = Scripted(GO_ON, DONE, system_prompt="Be brief.")
    obs, info = env.reset(seed=1)
    decode = env.chat.tokenizer.decode
    opened = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "task 473"}]
    assert info == {"messages": opened}
    assert decode(obs) == env.chat.tokenizer.apply_chat_template(opened, tokenize=False, add_generation_prompt=True)
    obs, reward, terminated, truncated, info = say(env, "hello")
    whole = [*opened, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "go on"}]
    assert info == {"messages": whole}
    assert decode(obs) == env.chat.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert obs.dtype == np.int32


def test_sampled_tokens_are_never_encoded_again():
    env = Scripted(GO_ON, DONE)
    obs, _ = env.reset(seed=1)
    # "answer" spelled in single bytes: no tokenizer would encode the text so
    odd = np.concatenate([env.chat.encode_reply(letter)[:-1] for letter in "answer"])
    action = np.append(odd, env.chat.stop_ids[0]).astype(np.int32)
    assert not np.array_equal(action, env.chat.encode_reply("answer"))
    after, *_ = env.step(action)
    assert np.array_equal(after[: len(obs) + len(action)], np.concatenate([obs, action]))
    assert env.heard == ["answer"]


def test_the_last_observation_is_context_and_action():
    env = Scripted(DONE)
    obs, _ = env.reset(seed=1)
    action = env.chat.encode_reply("bye")
    final, reward, terminated, truncated, info = env.step(action)
    assert np.array_equal(final, np.concatenate([obs, action]))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["stop_reason"] is StopReason.ANSWERED
    assert info["rewards"] == {"reward": 1.0}
    assert info["messages"][-1] == {"role": "assistant", "content": "bye"}


def test_named_rewards_are_summed_unweighted_and_weighted_in_the_reward():
    replies = [
        Reply(messages=GO_ON.messages, reward={"a": 1.0, "b": True}),
        Reply(done=True, reward={"a": 2, "c": 0.5}),
    ]
    env = Scripted(*replies, reward_weights={"a": 0.5, "c": 0})
    env.reset(seed=1)
    assert say(env, "x")[1] == 0.5 * 1 + 1
    *_, info = last = say(env, "y")
    assert last[1] == 0.5 * 2
    assert info["rewards"] == {"a": 3.0, "b": 1.0, "c": 0.5}


@pytest.mark.parametrize("number", [1, True, 0.5, np.float32(0.5), np.int64(3), np.bool_(True), Fraction(1, 2)])
def test_numbers_of_every_kind_are_rewards(number):
    env = Scripted(Reply(done=True, reward=number))
    env.reset(seed=1)
    reward = say(env, "x")[1]
    assert type(reward) is float
    assert reward == float(number)


@pytest.mark.parametrize("bad", ["1", None, float("nan"), float("inf"), np.ones(1), np.ones(()), [1.0], 1j])
def test_anything_else_is_refused_by_name(bad):
    for reward, name in ((bad, "reward"), ({"score": bad}, "score")):
        env = Scripted(Reply(done=True, reward=reward))
        env.reset(seed=1)
        with pytest.raises(RewardError, match=f"Scripted: reward component '{name}' is .*, want a finite number"):
            say(env, "x")


def test_a_cut_completion_is_graded_and_ends_the_episode():
    env = Scripted(DONE, max_tokens=4)
    env.reset(seed=1)
    letter = env.chat.encode_reply("a")[0]
    _, reward, terminated, truncated, info = env.step(np.full(4, letter, np.int32))
    assert (reward, terminated, truncated) == (1.0, False, True)
    assert info["stop_reason"] is StopReason.TOKEN_LIMIT
    assert env.heard == ["aaaa"]


def test_a_stop_token_at_the_limit_is_no_cut():
    env = Scripted(DONE, max_tokens=4)
    env.reset(seed=1)
    letter = env.chat.encode_reply("a")[0]
    for stop in env.chat.stop_ids:
        env.reset(seed=1)
        *_, info = env.step(np.array([letter] * 3 + [stop], np.int32))
        assert info["stop_reason"] is StopReason.ANSWERED


def test_turns_run_out():
    env = Scripted(GO_ON, Reply(messages=GO_ON.messages, reward=0.25), max_turns=2)
    env.reset(seed=1)
    assert "stop_reason" not in say(env, "x")[4]
    _, reward, terminated, truncated, info = say(env, "x")
    assert (reward, terminated, truncated, info["stop_reason"]) == (0.25, False, True, StopReason.TURN_LIMIT)


def test_the_context_runs_out_exactly_when_no_token_would_fit():
    env = Scripted(GO_ON, DONE)
    env.reset(seed=1)
    needed = len(say(env, "x")[0])
    for limit, stops in ((needed, True), (needed + 1, False)):
        env = Scripted(GO_ON, DONE, max_context=limit)
        first, _ = env.reset(seed=1)
        obs, _, terminated, truncated, info = say(env, "x")
        assert (terminated, truncated) == (False, stops)
        assert (info.get("stop_reason") is StopReason.TOKEN_LIMIT) is stops
        if stops:
            assert len(obs) == len(first) + len(env.chat.encode_reply("x"))


def test_a_completion_cut_by_the_context_is_cut_too():
    first, _ = Scripted(DONE).reset(seed=1)
    env = Scripted(DONE, max_context=len(first) + 3)
    letter = env.chat.encode_reply("a")[0]
    for length, reason in ((2, StopReason.ANSWERED), (3, StopReason.TOKEN_LIMIT)):
        env.reset(seed=1)
        *_, info = env.step(np.full(length, letter, np.int32))
        assert info["stop_reason"] is reason


def test_the_system_prompt_stands_in_place_of_the_environments_own():
    class Kind(Scripted):
        def open(self):
            return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]

    assert Kind().reset(seed=1)[1]["messages"][0]["content"] == "Be kind."
    _, info = Kind(system_prompt="Be brief.").reset(seed=1)
    assert info["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_first_context_that_does_not_fit_is_an_error_of_that_episode_alone():
    env = Scripted(DONE, max_context=5)
    with pytest.raises(LLMGymError, match=r"max_context: the first context has .* tokens, the limit is 5") as caught:
        env.reset(seed=1)
    assert not isinstance(caught.value, SettingError)


def test_a_stop_reason_ends_the_episode_and_decides_how():
    env = Scripted(Reply(stop_reason=StopReason.TOOL_FAILURE, reward=0.5), max_tokens=1)
    env.reset(seed=1)
    _, reward, terminated, truncated, info = env.step(env.chat.encode_reply("a")[:1])
    assert (reward, terminated, truncated, info["stop_reason"]) == (0.5, False, True, StopReason.TOOL_FAILURE)


def test_rewritten_history_opens_a_new_context_and_says_so():
    short = [{"role": "user", "content": "summary"}]
    env = Scripted(Reply(rewrite=short), DONE)
    env.reset(seed=1)
    obs, *_, info = say(env, "a long thought")
    assert info == {"messages": short, "rewritten": True}
    assert np.array_equal(obs, env.chat.open(short))
    assert say(env, "x")[4]["messages"] == [*short, {"role": "assistant", "content": "x"}]


def test_the_task_is_fixed_by_the_seed_or_named_by_the_options():
    env = Scripted(DONE)
    first = [env.reset(seed=s)[1]["messages"][0]["content"] for s in (1, 2, 1, np.int64(1))]
    assert first[0] == first[2] == first[3] != first[1]
    for seed in (1, 2):
        _, info = env.reset(seed=seed, options={"task": 17})
        assert info["messages"][0]["content"] == "task 17"
    assert env.reset(seed=1)[1]["messages"][0]["content"] == first[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tsak": 1}, "options: unknown value 'tsak'; did you mean 'task'"),
        ({"task": 1000}, "got 1000, want .* 0 to 999"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(SettingError, match=words):
        Scripted(DONE).reset(seed=1, options=options)


@pytest.mark.parametrize("action", [[], [[1, 2]], [0.5], "text", None, np.ones((2, 2), np.int32)])
def test_an_action_that_is_no_token_ids_is_refused(action):
    env = Scripted(DONE)
    env.reset(seed=1)
    with pytest.raises(InvalidAction, match="want token ids"):
        env.step(action)


def test_a_list_and_int64_are_token_ids_too():
    env = Scripted(GO_ON, DONE)
    env.reset(seed=1)
    action = env.chat.encode_reply("hello")
    env.step(action.tolist())
    final, *_ = env.step(action.astype(np.int64))
    assert final.dtype == np.int32
    assert env.heard == ["hello", "hello"]


def test_step_needs_reset():
    env = Scripted(DONE)
    with pytest.raises(ResetNeeded, match="before reset"):
        say(env, "x")
    env.reset(seed=1)
    say(env, "x")
    with pytest.raises(ResetNeeded, match="after the episode ended"):
        say(env, "x")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_turns": 0}, "max_turns: got 0"),
        ({"max_tokens": 1.5}, "max_tokens: got 1.5"),
        ({"max_context": -1}, "max_context: got -1"),
        ({"render_mode": "ansy"}, "render_mode: unknown value 'ansy'; did you mean 'ansi'"),
        ({"reward_weights": {"a": "much"}}, "reward_weights: got 'much' for 'a'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        Scripted(DONE, **kwargs)


def test_an_unknown_weight_is_refused_where_names_are_known():
    with pytest.raises(ConfigError, match="reward_weights: unknown value 'corect'; did you mean 'correct'"):
        gymnasium.make("llm_gym/Arithmetic-v0", reward_weights={"corect": 2.0})


def test_render_gives_the_chat():
    env = Scripted(GO_ON, render_mode="ansi")
    env.reset(seed=1, options={"task": 3})
    say(env, "hello")
    assert env.render() == "[user] task 3\n[assistant] hello\n[user] go on"


@pytest.mark.parametrize("messages", ["Guess!", [{"content": "Guess!"}], [None]])
def test_messages_of_another_form_are_refused(messages):
    env = Scripted(Reply(messages=messages))
    env.reset(seed=1)
    with pytest.raises(SettingError, match=r"Scripted: got .* among messages, want a form like"):
        say(env, "x")


@pytest.mark.parametrize("reply", [None, 1.0, {"reward": 1.0}])
def test_a_reply_of_another_form_is_refused(reply):
    env = Scripted(reply)
    env.reset(seed=1)
    with pytest.raises(SettingError, match=r"Scripted: reply\(\) returned .*, want a Reply"):
        say(env, "x")


def test_nested_messages_are_the_callers_own_too():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    env = Scripted(Reply(rewrite=[{"role": "user", "content": "q"}, call]), DONE)
    env.reset(seed=1)
    *_, info = say(env, "x")
    info["messages"][1]["tool_calls"][0]["function"]["name"] = "g"
    call["tool_calls"].clear()
    assert say(env, "y")[4]["messages"][1]["tool_calls"][0]["function"]["name"] == "f"


def test_hooks_must_be_written():
    with pytest.raises(NotImplementedError, match="TextEnv must define open"):
        TextEnv().reset(seed=1)


def test_importing_the_package_is_light():
    """On top of Gymnasium it imports nothing but itself and the standard library (some 15 ms)."""
    code = (
        "import gymnasium, sys; before = set(sys.modules); import llm_gym\n"
        "assert 'llm_gym/GSM8K-v0' in gymnasium.registry\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert tops - sys.stdlib_module_names <= {'llm_gym', 'numpy'}, tops\n"
        "from llm_gym import TextEnv, Reply, StopReason, Sampling, Episode\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_others_are_not():
    assert llm_gym.TextEnv is TextEnv
    assert set(llm_gym.__all__) <= set(dir(llm_gym))
    with pytest.raises(AttributeError, match="has no attribute 'TextEnvironment'"):
        _ = llm_gym.TextEnvironment


def test_make_imports_the_package_by_itself():
    code = "import gymnasium; print(gymnasium.make('llm_gym:llm_gym/Arithmetic-v0').reset(seed=1)[0].dtype)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "int32"
