"""Our environments behind OpenEnv's own server, played by OpenEnv's own client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("openenv", reason="needs `pip install --no-deps openenv==0.10.0`: its pins exclude fastmcp 4")

import uvicorn
from openenv.core.generic_client import GenericEnvClient

from llm_gym.envs import make
from llm_gym.errors import SettingError
from llm_gym.export import openenv_app


@contextmanager
def served(env_id: str, **env_args: Any) -> Iterator[str]:
    """Its address."""
    server = uvicorn.Server(uvicorn.Config(openenv_app(env_id, **env_args), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def guessing() -> Iterator[str]:
    with served("GuessNumber-v0", max_turns=8) as url:
        yield url


def client(url: str) -> Any:
    return GenericEnvClient(base_url=url).sync()


def test_their_client_plays_as_the_environment_is_played_here(guessing: str) -> None:
    env = make("GuessNumber-v0", max_turns=8)
    context, info = env.reset(seed=7)
    with client(guessing) as there:
        seen = there.reset(seed=7)
        assert seen.observation["messages"] == info["messages"]
        low, high, done = 1, 100, False
        while not done:
            assert seen.observation["prompt_ids"] == context.tolist()
            assert not seen.done
            guess = f"{(low + high) // 2}"
            context, reward, terminated, truncated, info = env.step(env.unwrapped.chat.encode_reply(guess, context))
            seen, done = there.step({"text": guess}), terminated or truncated
            assert (seen.reward, seen.done, seen.observation["truncated"]) == (reward, done, truncated)
            if not done:
                assert seen.observation["messages"] == info["messages"][-1:]
                higher = seen.observation["messages"][0]["content"] == "higher"
                low, high = (int(guess) + 1, high) if higher else (low, int(guess) - 1)
        assert seen.observation["stop_reason"] == info["stop_reason"] == "answered"
        assert seen.observation["rewards"] == info["rewards"]
        assert there.state()["step_count"] > 1


def test_sampled_ids_are_taken_as_they_are(guessing: str) -> None:
    ids = make("GuessNumber-v0").unwrapped.chat.encode_reply("50").tolist()
    with client(guessing) as there:
        before = there.reset(seed=3).observation["prompt_ids"]
        after = there.step({"tokens": ids}).observation["prompt_ids"]
    assert after[: len(before) + len(ids)] == before + ids


def test_a_limit_is_told_though_their_client_drops_metadata(guessing: str) -> None:
    with client(guessing) as there:
        there.reset(seed=1)
        for _ in range(8):
            last = there.step({"text": "No."})
    assert (last.done, last.observation["truncated"], last.observation["stop_reason"]) == (True, True, "turn_limit")
    assert last.observation["rewards"] == {"format": pytest.approx(-0.8)}


def test_sessions_do_not_share_an_environment_and_may_name_a_row(guessing: str) -> None:
    players = [client(guessing) for _ in range(4)]
    for secret, player in enumerate(players):
        player.reset(seed=1, task=secret)
    for secret, player in reversed(list(enumerate(players))):
        assert player.step({"text": str(secret + 1)}).reward == 1.0
        player.close()


def test_what_is_no_action_is_refused(guessing: str) -> None:
    with client(guessing) as there:
        there.reset(seed=1)
        with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
            there.step({"wrong": 1})


def test_tools_are_shown_and_answer() -> None:
    with served("MCPTool-v0") as url, client(url) as there:
        env = make("MCPTool-v0")
        seen = there.reset(seed=2).observation
        assert seen["tools"] == env.reset(seed=2)[1]["tools"]
        called = there.step({"text": env.unwrapped.call_text("calculator", expression="6*7")}).observation
        assert called["tools"] == []
        assert [(m["role"], m["content"]) for m in called["messages"]] == [("tool", "42")]
        env.close()


def test_settings_are_refused_before_anything_is_served() -> None:
    with pytest.raises(SettingError, match="max_turn"):
        openenv_app("GuessNumber-v0", max_turn=3)
