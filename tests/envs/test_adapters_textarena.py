"""TextArena's games as environments; one game of each kind there is: benchmarks/adapters.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm_gym import check_environment
from llm_gym.envs import make
from llm_gym.envs.adapters.foreign import GlobalRandom
from llm_gym.envs.adapters.textarena_moves import Invalid, random_move, take
from llm_gym.errors import ConfigError, LLMGymError


def begun(game: str, players: int = 2, seed: int = 0) -> Any:
    import textarena

    made = textarena.make(f"{game}-raw")
    made.reset(num_players=players, seed=seed)
    return made


@pytest.mark.parametrize("kwargs", [{"game": "Minesweeper-v0"}, {"game": "Nim-v0", "opponent": "random"}])
def test_a_sample_conforms(kwargs: dict[str, Any]) -> None:
    check_environment("TextArena-v0", **kwargs)


@pytest.mark.parametrize("game", ["TicTacToe-v0", "ConnectFour-v0", "Nim-v0", "KuhnPoker-v0", "ColonelBlotto-v0"])
def test_the_random_opponent_plays_valid_moves_to_the_end(game: str) -> None:
    rng, own, moves = np.random.default_rng(1), GlobalRandom(), set()
    with own:
        for seed in range(2):
            playing, over, seen = begun(game, seed=seed), False, ["", ""]
            while not over:
                player, news = playing.get_observation()
                seen[player] += "\n".join(text for _, text, _ in news)
                moves.add(move := random_move(playing, seen[player], rng))
                over = take(playing, move)
            assert not any(info["invalid_move"] for info in playing.state.game_info.values())
    assert len(moves) > 2


def test_an_invalid_move_of_the_opponent_is_nobodys_win() -> None:
    with GlobalRandom():
        playing = begun("TicTacToe-v0")
        for _ in range(3):
            with pytest.raises(Invalid):
                take(playing, "[99]")
        assert playing.state.rewards is None
        playing.step("[99]")  # as the game has it: the second one is the other's win
        playing.step("[99]")
        assert playing.state.rewards == {0: -1, 1: 1}


def test_an_opponent_that_finds_no_valid_move_ends_the_episode_without_an_outcome() -> None:
    """This game raises on every move of anybody, in version 0.7.4."""
    env: Any = make("TextArena-v0", game="CharacterConclave-v0", opponent="random").unwrapped
    ends = set()
    for seed in range(6):
        try:
            env.reset(seed=seed)
        except LLMGymError as error:
            ends.add(str(error).partition(" (")[0])
            continue
        *_, info = env.step(env.chat.encode_reply("hello"))
        ends.add((str(info["stop_reason"]), info["rewards"]["outcome"]))
    assert ends == {"opponent: none of the moves that it tried was valid", ("bad_reply", -1.0)}


def played(text: str, seed: int, **kwargs: Any) -> dict[str, Any]:
    """The last info of an episode of one reply over and over."""
    env: Any = make("TextArena-v0", **kwargs).unwrapped
    env.reset(seed=seed)
    over = False
    while not over:
        *_, terminated, truncated, info = env.step(env.chat.encode_reply(text))
        over = terminated or truncated
    return info


def test_invalid_moves_lose_and_valid_ones_may_win() -> None:
    assert played("I would rather not.", 0, game="TicTacToe-v0", opponent="random")["rewards"] == {"outcome": -1.0}
    game = {"game": "IteratedRockPaperScissors-v0", "opponent": "random"}
    outcomes = {played("[rock]", seed, **game)["rewards"]["outcome"] for seed in range(8)}
    assert outcomes >= {-1.0, 1.0}


def test_both_seats_are_played_and_the_other_is_told_apart() -> None:
    env: Any = make("TextArena-v0", game="TicTacToe-v0", opponent="random").unwrapped
    firsts = {}
    for seed in range(8):
        _, info = env.reset(seed=seed)
        firsts[env.seat] = info["messages"][0]["content"]
    assert sorted(firsts) == [0, 1]
    assert "[Player 0]" not in firsts[0]
    assert "[Player 0] [" in firsts[1]


def test_ids_with_an_ending_are_the_same_game() -> None:
    names = [make("TextArena-v0", game=f"GuessTheNumber-v0{end}").unwrapped.game for end in ("", "-raw", "-train")]  # type: ignore[attr-defined]
    assert names == ["GuessTheNumber-v0"] * 3


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"game": "GuessTheNumbre-v0"}, "game: unknown value 'GuessTheNumbre-v0'; did you mean 'GuessTheNumber-v0'"),
        ({"game": "TicTacToe-v0"}, "game: 'TicTacToe-v0' is for several players; opponent=random plays the others"),
        ({"game": "TicTacToe-v0", "opponent": "rnd"}, "opponent: unknown value 'rnd'"),
        ({"game": "TicTacToe-v0", "players": 7, "opponent": "random"}, "cannot begin for 7 here: AssertionError"),
        ({"game": "GuessWho-v0"}, "game: 'GuessWho-v0' cannot begin for 1 here: ValueError: .*API key"),
        ({"config": {"nonsense": 1}}, "cannot begin for 1 here: TypeError"),
    ],
)
def test_what_cannot_be_played_is_one_sentence(kwargs: dict[str, Any], words: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=words):
        make("TextArena-v0", **kwargs)
