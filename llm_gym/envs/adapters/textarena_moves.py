"""A random opponent for TextArena's games. It knows no rules: it tries moves on copies of the game."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from llm_gym.errors import LLMGymError, described

TRIES, DRAWS = 3000, 12_000
"""Moves tried before the opponent gives up, and with it the episode; and draws that may give one tried before."""
RULES, NEWS = 8_000, 12_000
"""How much it reads of the beginning and of the end of what it was shown, in characters."""
SPANS = (3, 6, 10, 16)
"""Below which the numbers of a variant lie: most boards are small."""
_TAGS = re.compile(r"\[(?:GAME|Player \d+)\]")
_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\](?: [A-Z]{2,10}\b)?")
_PART = re.compile(r"(\d+|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))")
USUAL = (
    "[0]", "[0 0]", "[1 2 3]", "[a1]", "[A1]", "[a2a3]", "[up]", "[left]", "[pass]", "[done]", "[Call]", "[Check]",
    "I have nothing to say.",
)  # fmt: skip
"""What is tried beside what the game has shown."""


class Invalid(BaseException):
    """A game found a move invalid; no game catches this."""


def take(game: Any, move: str) -> bool:
    """A move that must be valid; returns whether the game is over.

    Raises:
        Invalid: it is not. The game is then of no more use.
        Exception: whatever the game raises.
    """

    def refuse(*given: Any, **named: Any) -> None:
        raise Invalid(move)

    game.state.set_invalid_move = refuse
    try:
        return bool(game.step(move)[0])
    finally:
        del game.state.set_invalid_move


def random_move(game: Any, seen: str, rng: np.random.Generator) -> str:
    """A random move among those that the game takes from the player whose turn it is.

    Args:
        game: the game; it is not changed.
        seen: all that the player was shown, from which forms of moves are taken.
        rng: what is drawn.

    Raises:
        LLMGymError: none of `TRIES` moves was valid; the episode fails, and nobody has won.
    """
    last = ""
    for move in islice(_moves(seen, rng), TRIES):
        try:
            take(copy.deepcopy(game), move)
        except Invalid:
            continue
        except Exception as error:
            last = f" (one raised {described(error)})"
            continue
        return move
    raise LLMGymError(f"opponent: none of the moves that it tried was valid{last}.")


def _moves(seen: str, rng: np.random.Generator) -> Iterator[str]:
    """Moves to try: those that were shown, then variants of them and of usual ones."""
    text = seen if len(seen) <= RULES + NEWS else f"{seen[:RULES]}\n{seen[-NEWS:]}"
    shown = list(dict.fromkeys(_MOVE.findall(_TAGS.sub("", text))))
    tried = [shown[index] for index in rng.permutation(len(shown))]
    yield from tried
    known, forms = set(tried), [shown or USUAL, shown or USUAL, shown or USUAL, USUAL]
    for _ in range(DRAWS):
        span, kept, among = SPANS[rng.integers(len(SPANS))], rng.random(), forms[rng.integers(len(forms))]
        form = _PART.split(among[rng.integers(len(among))])  # every second part may change
        move = "".join(
            _other(part, span, rng) if i % 2 and rng.random() > kept else part for i, part in enumerate(form)
        )
        if move not in known:
            known.add(move)
            yield move


def _other(part: str, span: int, rng: np.random.Generator) -> str:
    """Another number, or another letter in the same case; a capital may stand for a number."""
    number = int(rng.integers(span))
    if part.isdigit() or (part.isupper() and rng.random() < 0.5):
        return str(number)
    letter = "abcdefghijklmnop"[number]
    return letter.upper() if part.isupper() else letter
