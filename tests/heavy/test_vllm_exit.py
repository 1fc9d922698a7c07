"""A vLLM engine in a process of its own: however the process ends, it ends, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from leftovers import session
from sandbox_tiers import within

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")

START = """
import signal, threading
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)
import llm_gym.policies.vllm.policy as module
from llm_gym.core import Sampling
from llm_gym.errors import PolicyError

def say(text):
    print(text, flush=True)

make = module.make_engine
def watched(settings):
    say("building")
    return make(settings)
module.make_engine = watched

say("importing")
policy = module.VLLMPolicy(max_context=512, dtype="float32")
def sample(count):
    policy.generate([np.arange(10, 40)] * count, Sampling(max_tokens=400, stop_token_ids=()))
"""
FOREVER = """
say("sampling")
while True:
    sample(32)
"""
UNDER_WAY = """
def quietly():  # a thread that is cut off while it writes to standard error is Python's own fatal error
    try:
        sample(32)
    except PolicyError:
        pass
threading.Thread(target=quietly, daemon=True).start()
while not policy.thread.requests:
    pass
say("leaving")
"""
"""Requests are in flight, nobody closes anything, and the script is over."""


def start(script: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", START + script]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and standard error; fails if it hangs or leaves a process behind."""
    try:
        _, errors = process.communicate(timeout=300)
        alone = within(60, lambda: not session(process.pid))
    finally:
        left = session(process.pid)
        for other in left:
            other.kill()
    assert alone, left
    return process.returncode, errors


@pytest.mark.parametrize(
    "moment", [*(pytest.param(each, marks=pytest.mark.soak) for each in ("importing", "building")), "sampling"]
)
def test_ctrl_c_ends_it_at_any_moment(moment: str) -> None:
    process = start(FOREVER)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == moment:
            break
    process.send_signal(signal.SIGINT)
    status, errors = finish(process)
    # 1: vLLM imports Ray where it is installed, and a Python that has imported Ray ends so.
    assert status in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert "KeyboardInterrupt" in errors


def test_a_script_that_forgets_to_close_it_ends_all_the_same() -> None:
    status, errors = finish(start(UNDER_WAY))
    assert status == 0, errors
    assert "Fatal" not in errors
    assert "terminate" not in errors
