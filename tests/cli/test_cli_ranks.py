"""How a process is ended that is one of several; whole runs are in tests/heavy/test_nproc.py."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_gym import TextEnv
from llm_gym.cli.nproc import PATIENCE, account, as_rank
from llm_gym.core import Sampling
from llm_gym.policies import make_policy
from llm_gym.rollouts.driver import rollout


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are handled again as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("interrupted", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_a_process_without_a_word(
    interrupted: Any, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Ctrl-C is ignored; the second one, while it is on its way out, does nothing."""
    monkeypatch.setenv("RANK", "0")
    signal.signal(signal.SIGINT, interrupted)

    def twice() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended, as_rank(0):
        twice()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_who_did_not_hear_sigterm_and_was_killed_is_not_the_cause() -> None:
    """(exit code, when the agent saw it, in whole seconds) of each rank."""

    def ended(*ranks: tuple[int, int]) -> Exception:
        rows = [SimpleNamespace(exitcode=c, timestamp=1000 + at, error_file="", message="") for c, at in ranks]
        return account(dict(enumerate(rows)), None)

    assert ended((2, 0), (-9, PATIENCE)).exit_code == 2  # type: ignore[attr-defined]
    for early in ended((2, 0), (-9, 0)), ended((-9, PATIENCE), (-9, 0)):
        assert str(early) == "rank 1 was killed by SIGKILL; the other processes were stopped."


class Ended(TextEnv):
    """Its process is asked to end in the middle of a rollout."""

    played = 0

    def open(self) -> Any:
        Ended.played += 1
        if Ended.played == 6:
            signal.raise_signal(signal.SIGTERM)
        return [{"role": "user", "content": "go"}]

    def reply(self, text: str) -> Any:
        raise AssertionError


def test_sigterm_in_a_rollout_leaves_no_task_that_complains(
    handlers: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    policy = make_policy(None, device="cpu", dtype=torch.float32)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit), as_rank(0):
        rollout(Ended, policy, seeds=range(16), sampling=Sampling(max_tokens=8))
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []
