"""`TextArena-v0`: the games of TextArena (https://github.com/LeonGuertler/TextArena), from one player's seat."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llm_gym.core import Messages, StopReason
from llm_gym.env import Reply
from llm_gym.envs.adapters.foreign import ForeignEnv
from llm_gym.envs.adapters.packages import load
from llm_gym.envs.adapters.textarena_moves import Invalid, random_move, take
from llm_gym.errors import FAULTS, ConfigError, LLMGymError, check_counts, described, unknown
from llm_gym.rewards import finite

VARIANTS = ("-raw", "-train")
"""Endings of ids whose games show and read the same in other words; the game itself is `-raw`."""
OPPONENTS = ("random",)
MOST_PLAYERS = 15
MOST_TURNS = 1000
"""Turns of others in a row."""
CRASHED = -1.0
"""The outcome of a reply on which the game raises: not more than what an invalid move costs in most games."""


class TextArena(ForeignEnv):
    """A game, played by replies in the form that the game asks for, mostly `[move]`.

    Args:
        game: its id, such as `Wordle-v0`.
        opponent: who has the other seats of a game for several: `random` plays random valid moves; None: nobody, and
            the game must be for one player.
        players: how many play; None: as few as the game allows.
        config: settings of the game by name.
        kwargs: the common arguments of `TextEnv`.

    Reward component: `outcome`, what the game gives this seat at its end (mostly -1 to 1); 0 if it comes to none.

    Raises:
        ConfigError: an unknown game, one for several players without an opponent, one that cannot be made here, or
            TextArena is not installed.
    """

    reward_names = ("outcome",)
    example_replies = ("[1]", "[4]", "[7]", "[0 1]", "[up]", "[left]", "[crane]", "[A]", "[hit]", "[red]", "[e2e4]")

    def __init__(
        self,
        *,
        game: str = "GuessTheNumber-v0",
        opponent: str | None = None,
        players: int | None = None,
        config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_counts({"players": players})
        self._suite = load("TextArena-v0")
        registry = self._suite.envs.registration.ENV_REGISTRY
        base = next((game.removesuffix(ending) for ending in VARIANTS if game.endswith(ending)), game)
        if base not in registry:
            raise ConfigError(unknown("game", game, [name for name in registry if not name.endswith(VARIANTS)]))
        self._id = f"{base}-raw" if f"{base}-raw" in registry else base
        if opponent is not None and opponent not in OPPONENTS:
            raise ConfigError(unknown("opponent", opponent, OPPONENTS))
        self.game, self._config = base, dict(config or {})
        with self.globals:
            self.players = players or self._fewest()
            single = isinstance(self._begun(self.players, 0).state, self._suite.SinglePlayerState)
        if not single and opponent is None:
            raise ConfigError(f"game: {base!r} is for several players; opponent=random plays the others.")

    def open(self) -> Messages:
        """The rules, and what the others have done before one's first turn."""
        seed = self.draw_seed()
        self.seat = int(self.np_random.integers(self.players))
        with self.globals:
            self._playing = self._begun(self.players, seed)
            self._seen = [""] * self.players
            news, self._over = self._others(over=False)
        return [{"role": "user", "content": news or "The game begins."}]

    def reply(self, text: str) -> Reply:
        """Makes a move, and those of the others until it is one's turn again."""
        if self._over:  # the others have ended it before one's first turn
            return self._ended([])
        with self.globals:
            try:
                over = bool(self._playing.step(text)[0])
            except FAULTS as error:
                return self._crashed(described(error))
            news, over = self._others(over=over)
        messages = [{"role": "user", "content": news or "Your turn."}]
        return self._ended(messages if news else []) if over else Reply(messages=messages, reward={"outcome": 0.0})

    def _begun(self, players: int, seed: int) -> Any:
        """A new game; some keep things over a reset.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            game = self._suite.make(self._id, **self._config)
            vars(sys.modules[type(game).__module__])["print"] = lambda *given, **named: None  # some print what they do
            game.reset(num_players=players, seed=seed)
        except FAULTS as error:
            said = " ".join(described(error).replace("*", " ").split())
            raise ConfigError(f"game: {self.game!r} cannot begin for {players} here: {said:.160}.") from error
        return game

    def _fewest(self) -> int:
        """As few players as a game allows.

        Raises:
            ConfigError: it cannot be made for any number.
        """
        failure = None
        for players in range(1, MOST_PLAYERS + 1):
            try:
                state = self._begun(players, 0).state
            except ConfigError as error:
                failure = failure or error
                if not isinstance(error.__cause__, AssertionError | ValueError):
                    break
                continue
            if state.num_players == players and (players > 1 or isinstance(state, self._suite.SinglePlayerState)):
                return players
        raise failure or ConfigError(f"game: {self.game!r} can be played by no number of players.")

    def _others(self, *, over: bool) -> tuple[str, bool]:
        """Plays the other seats until it is one's turn; returns what one was told since, and whether the game is over.

        Raises:
            LLMGymError: an opponent finds no valid move, or it never becomes one's turn: nobody has won.
        """
        for _ in range(MOST_TURNS):
            if over:
                return self._told(self.seat, self._playing.state.observations.get(self.seat, ())), True
            player, news = self._playing.get_observation()
            told = self._told(player, news)
            if player == self.seat:
                return told, False
            self._seen[player] += told
            move = random_move(self._playing, self._seen[player], self.np_random)
            try:
                over = take(self._playing, move)
            except Invalid as error:
                raise LLMGymError(f"opponent: {self.game} takes the move {move!r} no more.") from error
        raise LLMGymError(f"game: {self.game} gives no turn to seat {self.seat}.")

    def _told(self, player: int, news: Sequence[tuple[int, str, Any]]) -> str:
        """What a player reads of messages (sender, text, kind); not what it said itself."""
        own = self._suite.ObservationType.PLAYER_ACTION
        names = self._playing.state.role_mapping
        lines = [
            text if sender < 0 else f"[{names.get(sender, f'Player {sender}')}] {text}"
            for sender, text, kind in news
            if isinstance(kind, type(own)) and not (sender == player and kind is own)  # two games mix the three up
        ]
        return "\n".join(lines).strip()

    def _ended(self, messages: Messages) -> Reply:
        """The end of a game, with what this seat gets for it."""
        given = (self._playing.state.rewards or {}).get(self.seat, 0.0)
        outcome = finite(given)
        if outcome is None:  # two games end on an invalid move with its reason in the place of a number
            return self._crashed(str(given))
        return Reply(messages=messages, reward={"outcome": outcome}, done=True)

    def _crashed(self, said: str) -> Reply:
        """The end of a game that could make nothing of the reply."""
        error = f"{self.game} can make nothing of the reply: {said}"
        return Reply(reward={"outcome": CRASHED}, done=True, stop_reason=StopReason.BAD_REPLY, error=error)
