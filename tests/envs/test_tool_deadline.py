"""Calls with a deadline, and forks."""

from __future__ import annotations

import os
import time

import pytest

from llm_gym.concurrency import Overdue, Runner


def test_a_call_that_is_late_is_abandoned_and_the_next_is_not() -> None:
    runner = Runner()
    with pytest.raises(Overdue):
        runner.call(lambda: time.sleep(3), 0.05)
    assert runner.call(lambda: 6 * 7, 60) == 42
    runner.close()


def test_a_forked_child_has_no_thread_and_starts_its_own() -> None:
    runner = Runner()
    assert runner.call(lambda: 1, 60) == 1
    child = os.fork()
    if child == 0:  # no test code may run on in the child
        try:
            os._exit(runner.call(lambda: 42, 20))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert runner.call(lambda: 2, 60) == 2
    runner.close()
