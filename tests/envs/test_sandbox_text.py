"""Output as text: safe to show, and bounded."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from llm_gym.envs.tools.sandbox import text


@given(st.binary(max_size=2000))
def test_clean_text_has_no_control_characters_and_stays_clean(data: bytes) -> None:
    cleaned = text.clean(data.decode("utf-8", "replace"))
    assert all(c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in cleaned)
    cleaned.encode()
    assert text.clean(cleaned) == cleaned


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs"]), max_size=300))
def test_ordinary_text_is_not_touched(words: str) -> None:
    assert text.clean(words) == words


def test_terminal_escapes_go_and_overwritten_lines_show_their_end() -> None:
    assert text.clean("\x1b[31mred\x1b[0m\x1b]0;title\x07!") == "red!"
    assert text.clean("10%\r50%\r100%\nnext\r\n") == "100%\nnext\n"
    assert text.clean("a\x00b\x08\udcff") == "a\\x00b\\x08\\udcff"


@given(st.integers(0, 5000), st.integers(100, 1000))
def test_a_file_is_read_within_bounds_and_the_count_is_right(size: int, most: int) -> None:
    fd = os.memfd_create("test")
    try:
        os.write(fd, b"code" + b"h" * (size // 2) + b"t" * (size - size // 2))
        shown = text.read(fd, 4, most)
    finally:
        os.close(fd)
    if size <= most:
        assert shown == "h" * (size // 2) + "t" * (size - size // 2)
    else:
        half = most // 2
        assert shown == "h" * half + f"\n[... {size - 2 * half:,} characters left out ...]\n" + "t" * half
