"""`GuessNumber-v0`: a multi-turn game, and the pattern to copy for an environment of your own."""

from __future__ import annotations

import re
from typing import Any

from llm_gym.core import Messages
from llm_gym.env import Reply, TextEnv
from llm_gym.errors import ConfigError


class GuessNumber(TextEnv):
    """Find a secret whole number; every guess is answered with "higher" or "lower".

    Args:
        low: smallest secret.
        high: largest secret.
        max_turns: guesses allowed.
        kwargs: the common arguments of `TextEnv`.

    Reward components: `found` (1 for the secret) and `format` (-0.1 for a reply without a number).
    """

    reward_names = ("found", "format")

    def __init__(self, *, low: int = 1, high: int = 100, max_turns: int = 10, **kwargs: Any) -> None:
        super().__init__(max_turns=max_turns, **kwargs)
        if low > high:
            raise ConfigError(f"low, high: got {low} and {high}, want low <= high.")
        self.low, self.high = low, high

    def open(self) -> Messages:
        """Draws the secret (row i is the secret `low + i`) and states the rules."""
        self.secret = self.low + self.draw_task(self.high - self.low + 1)
        rules = f"Guess my number from {self.low} to {self.high}. Reply with one number."
        return [{"role": "user", "content": rules}]

    def reply(self, text: str) -> Reply:
        """Compares the last number of the reply with the secret."""
        numbers = re.findall(r"-?\d+", text)
        if not numbers:
            return self._say("Reply with one number.", {"format": -0.1})
        guess = int(numbers[-1][:20])
        if guess == self.secret:
            return Reply(reward={"found": 1.0}, done=True)
        return self._say("higher" if guess < self.secret else "lower", {"found": 0.0})

    def _say(self, words: str, reward: dict[str, float]) -> Reply:
        return Reply(messages=[{"role": "user", "content": words}], reward=reward)
