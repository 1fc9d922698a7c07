"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LLM_GYM_SHARED", Path(__file__).parents[1].resolve().parent / "shared"))
"""Data that lies beside the checkout, not in it."""


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """`shared("data/gsm8k/test.jsonl")`: a path beside the checkout; the test is skipped where it is absent."""

    def find(path: str) -> Path:
        if not (SHARED / path).exists():
            pytest.skip(f"needs {path} in the folder `shared` beside the checkout (or in $LLM_GYM_SHARED)")
        return SHARED / path

    return find
