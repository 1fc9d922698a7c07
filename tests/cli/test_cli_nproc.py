"""What is said for several processes of which some have failed; whole runs are in tests/heavy/test_nproc.py."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from llm_gym.cli.group import EXIT_INTERRUPTED, EXIT_SETTING
from llm_gym.cli.nproc import OURS, account, as_rank
from llm_gym.errors import ConfigError


def failed(tmp_path: Path, rank: int, code: int, sentence: str | None = None) -> ProcessFailure:
    """A rank's failure as torchrun's agent sees it, after the rank has left word as it does."""
    folder = tmp_path / str(rank)
    folder.mkdir()
    if sentence is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHELASTIC_RUN_ID", f"{OURS}1")
            patch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
            with pytest.raises(click.exceptions.Exit) as left, as_rank(rank):
                raise ConfigError(sentence)
        assert left.value.exit_code == code
        assert [file.name for file in folder.iterdir()] == ["error.json"]
    return ProcessFailure(rank, 1, code, str(folder / "error.json"))


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({0: (2, "lr: got 'x'"), 1: (2, "lr: got 'x'")}, "lr: got 'x'"),
        ({1: (2, "only here")}, "only here"),
        ({0: (-signal.SIGTERM, None), 1: (2, "only here")}, "only here"),
        ({0: (128 + signal.SIGTERM, None), 2: (2, "naïve")}, "naïve"),
        ({0: (2, "rank 1 is gone"), 1: (-signal.SIGKILL, None)}, "rank 1 was killed by SIGKILL; the other processes"),
        ({1: (1, None)}, r"rank 1 failed \(exit code 1\); the other processes were stopped"),
    ],
)
def test_one_sentence_for_all(ends: dict[int, tuple[int, str | None]], said: str, tmp_path: Path) -> None:
    failures: dict[int, Any] = {rank: failed(tmp_path, rank, *end) for rank, end in ends.items()}
    for order in (failures, dict(reversed(failures.items()))):
        with pytest.raises(click.ClickException, match=said) as ended:
            raise account(order, verdict=None)
        assert ended.value.exit_code == EXIT_SETTING


@pytest.mark.parametrize(("code", "verdict"), [(EXIT_SETTING, None), (EXIT_INTERRUPTED, None), (3, 3)])
def test_nothing_more_where_a_rank_has_spoken(code: int, verdict: int | None, tmp_path: Path) -> None:
    ended = account({0: failed(tmp_path, 0, code)}, verdict)
    assert isinstance(ended, click.exceptions.Exit)
    assert ended.exit_code == code


def test_under_another_launcher_each_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match="here"), as_rank(1):
        raise ConfigError("here")
