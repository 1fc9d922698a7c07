"""How Gymnasium's environments are told in words: what is known of some by name, and MiniGrid's view."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

LARGEST = 64
"""Most numbers that an observation is told by."""


class Known(NamedTuple):
    """What is said of an environment whose own description is nothing that a model reads."""

    about: str = ""
    actions: Sequence[str] = ()
    features: Sequence[str] = ()
    """What the numbers of an observation are."""


KNOWN = {
    "Acrobot": Known(
        "Swing the free end of two joined links above the line.",
        ("push back", "nothing", "push on"),
        ("cos 1", "sin 1", "cos 2", "sin 2", "speed 1", "speed 2"),
    ),
    "Blackjack": Known(
        "Come closer to 21 than the dealer, and not above.",
        ("stick", "hit"),
        ("your sum", "the dealer's card", "a usable ace"),
    ),
    "CartPole": Known(
        "Keep the pole on the cart upright.",
        ("left", "right"),
        ("position", "velocity", "angle", "angular velocity"),
    ),
    "CliffWalking": Known("Walk from x to T and not into the cliff C.", ("up", "right", "down", "left")),
    "FrozenLake": Known(
        "Walk over the frozen lake from S to G and not into a hole H; the ice may be slippery. [ ] is where you are.",
        ("left", "down", "right", "up"),
    ),
    "LunarLander": Known(
        "Land between the flags, softly.",
        ("nothing", "fire left", "fire main", "fire right"),
        ("x", "y", "x velocity", "y velocity", "angle", "angular velocity", "left leg down", "right leg down"),
    ),
    "MountainCar": Known(
        "Drive out of the valley to the flag at 0.5; swing to gather speed.",
        ("left", "nothing", "right"),
        ("position", "velocity"),
    ),
    "Taxi": Known(
        "Fetch the passenger and bring them to the destination; | is a wall.",
        ("south", "north", "east", "west", "pickup", "dropoff"),
    ),
}
"""Beginning of an environment's name -> what is said of it."""


def known(name: str) -> Known:
    """What is known of an environment, by its name."""
    bare = name.rpartition(":")[2].rpartition("/")[2]
    return next((entry for start, entry in KNOWN.items() if bare.startswith(start)), Known())


def tellable(space: Any) -> bool:
    """Whether observations of a space can be told in words."""
    if isinstance(space, spaces.Dict):
        return {"image", "mission"} <= space.keys()
    if isinstance(space, spaces.Tuple):
        return all(map(tellable, space))
    return isinstance(space, spaces.Discrete | spaces.Text) or int(np.prod(space.shape or (LARGEST + 1,))) <= LARGEST


def told(observation: Any, features: Sequence[str]) -> str:
    """An observation in words: MiniGrid's view, named numbers, or numbers."""
    if isinstance(observation, Mapping):
        return view(observation)
    if isinstance(observation, str):
        return observation
    if not isinstance(observation, tuple | np.ndarray):
        return f"State {observation}."
    parts = list(observation) if isinstance(observation, tuple) else list(observation.reshape(-1))
    numbers = [f"{float(part):.3g}" for part in parts]
    if len(features) != len(numbers):
        return " ".join(numbers)
    return ", ".join(f"{feature} {number}" for feature, number in zip(features, numbers, strict=True))


def unpainted(text: str) -> str:
    """A rendering for terminals, its coloured cells in brackets and without the line that names the last action."""
    marked = re.sub(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", r"[\1]", text, flags=re.DOTALL)
    lines = re.sub(r"\x1b\[[\d;]*m", "", marked).splitlines()
    return "\n".join(line for line in lines if line.strip() and not re.fullmatch(r" +\([\w ]+\)", line))


def passenger(env: Any, observation: Any) -> str:
    """Where Taxi's passenger is and wants to go, which its rendering shows by colours."""
    row, column, place, goal = env.decode(observation)
    names = ("R", "G", "Y", "B", "your taxi")
    return f"You: row {row}, column {column}. The passenger: at {names[place]}, going to {names[goal]}."


def view(seen: Mapping[str, Any]) -> str:
    """MiniGrid's partial view: how far one can go, and what stands where, as seen from the agent.

    Args:
        seen: its observation; `image` is [w, w, 3] of object, colour and state, the agent in the middle of the last
            row and looking at the first.
    """
    image = seen["image"]
    width = len(image)
    middle, last = width // 2, width - 1
    cells = {(x - middle, last - y): _cell(*map(int, image[x, y])) for x in range(width) for y in range(width)}
    carried = cells.pop((0, 0))
    near = sorted(cells, key=lambda place: (place[1], place[0]))
    things = [f"{cells[place]} {_place(*place)}" for place in near if cells[place] not in (*FREE, "unseen", "wall")]
    facing = ("east", "south", "west", "north")[int(seen["direction"])]
    lines = [
        f"Mission: {seen['mission']}. You face {facing}.",
        f"Ahead: {_way(cells, 0, 1)}. Left: {_way(cells, -1, 0)}. Right: {_way(cells, 1, 0)}.",
        f"You see: {'; '.join(things) or 'nothing'}.",
    ]
    if carried.endswith(MOVABLE):
        lines.append(f"You carry: {carried}.")
    return "\n".join(lines)


FREE = ("empty", "floor")
MOVABLE = ("key", "ball", "box")


def _cell(kind: int, colour: int, state: int) -> str:
    """What stands in a cell."""
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX  # an extra

    word, shade, how = (
        next(name for name, index in table.items() if index == number)
        for table, number in ((OBJECT_TO_IDX, kind), (COLOR_TO_IDX, colour), (STATE_TO_IDX, state))
    )
    return f"{how} {shade} door" if word == "door" else f"{shade} {word}" if word in MOVABLE else str(word)


def _way(cells: Mapping[tuple[int, int], str], right: int, ahead: int) -> str:
    """How far one can go in a direction, and what is in the way."""
    free = 0
    while (end := cells.get(((free + 1) * right, (free + 1) * ahead), "unseen")) in FREE:
        free += 1
    return f"{free} free" + ("" if end == "unseen" else f", then {end}")


def _place(right: int, ahead: int) -> str:
    """A place as the agent sees it."""
    side = f"{abs(right)} {'right' if right > 0 else 'left'}" if right else ""
    return " ".join(filter(None, (f"{ahead} ahead" if ahead else "", side)))
