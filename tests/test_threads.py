"""Waiting for a thread, twice."""

from __future__ import annotations

import signal
import sys
import threading
import traceback

import pytest

from llm_gym.concurrency import Thread


def test_an_interrupted_join_can_be_repeated() -> None:
    """Before Python 3.13 the second `join` of a `threading.Thread` returns while the thread is still running."""
    release, steps = threading.Event(), list[str]()
    main = threading.main_thread().ident or 0

    def target() -> None:
        while "join" not in {frame.name for frame in traceback.extract_stack(sys._current_frames()[main])}:
            pass
        signal.pthread_kill(main, signal.SIGINT)
        release.wait()
        steps.append("worked")

    thread = Thread(target, name="test")
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        thread.join()
    assert thread.is_alive()
    thread.join(timeout=0.01)
    assert thread.is_alive()
    assert not steps
    release.set()
    thread.join()
    assert steps == ["worked"]
    assert not thread.is_alive()


def test_an_interrupted_start_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who was interrupted can end it."""
    release = threading.Event()
    thread = Thread(release.wait, name="test")

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(thread._started, "wait", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        thread.start()
    assert thread.is_alive()
    release.set()
    thread.join()
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_ends_with_an_error_too() -> None:
    def fail() -> None:
        raise SystemExit

    thread = Thread(fail, name="test")
    thread.start()
    thread.join()
    assert not thread.is_alive()
