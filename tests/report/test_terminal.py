from __future__ import annotations

import math

from llm_gym.report import terminal_curve


def rows_with_dots(text: str) -> list[list[int]]:
    """Per line of the plot, the columns that hold a dot."""
    return [[i for i, c in enumerate(line) if 0x2800 < ord(c) <= 0x28FF] for line in text.split("\n")[1:-1]]


def test_a_rising_curve_rises() -> None:
    text = terminal_curve([i / 99 for i in range(100)], "reward", width=40, height=8)
    lines = text.split("\n")
    assert lines[0] == "reward"
    assert len(lines) == 10
    assert len({len(line) for line in lines[1:]}) == 1
    middles = [sum(columns) / len(columns) for columns in rows_with_dots(text)]
    assert middles == sorted(middles, reverse=True), "the top line holds the latest values"
    assert "1" in lines[1]
    assert lines[-1].endswith("100")


def test_every_column_of_a_line_is_drawn() -> None:
    columns = {c for row in rows_with_dots(terminal_curve([0.0, 1.0, 0.0], "t", width=30)) for c in row}
    assert len(columns) == 30


def test_few_or_broken_values() -> None:
    assert terminal_curve([], "reward") == "reward: nothing to draw"
    assert terminal_curve([math.nan], "reward") == "reward: nothing to draw"
    assert sum(map(len, rows_with_dots(terminal_curve([0.5], "reward")))) == 1
    assert "nan" not in terminal_curve([0.1, math.nan, 0.3, math.inf], "reward")
