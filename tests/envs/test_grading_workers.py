"""The worker pool: deadlines that kill, threads, asyncio, forks, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_gym.envs.grading import Grade, verify, verify_async, verify_many, workers
from llm_gym.envs.grading.verify import read
from llm_gym.errors import SettingError

GOLD = r"x^2 + \sqrt{2}"
RIGHT = r"\boxed{\sqrt 2 + x^2}"
POWER_TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def pool():
    """A pool of this test's own."""
    workers.close()
    yield workers.pool()
    workers.close()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    """Waits for what must come, at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_worker_that_overruns_is_killed_and_replaced(pool):
    assert verify(GOLD, RIGHT).score == 1
    (before,) = pool.pids()
    grade = verify(GOLD, POWER_TOWER, deadline=0.5)
    assert (grade.score, grade.status) == (0.0, "timeout")
    assert "more than 0.5 s" in grade.why
    assert not alive(before)
    assert verify(GOLD, RIGHT).score == 1
    assert pool.pids() != [before]


HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "factorial": "((99999!)!)!",
    "binomial": r"\binom{10000000}{5000000}",
    "power": "(x+1)^{10000000}",
    "parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "a few parentheses": "(" * 900 + "1" + ")" * 900,
    "fractions": r"\frac{1}{1+" * 150 + "2" + "}" * 150,
    "roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^n}",
    "list": ",".join(map(str, range(500))),
    "signs": r"\pm 1" * 300,
    "nul": "x\0" * 500,
    "surrogates": "\ud800x" * 300,
    "megabytes": "x+" * 2_000_000 + "1",
    "sines": r"\sin(" * 150 + "x" + ")" * 150,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_answer_costs_its_deadline_at_most_and_this_process_nothing(answer):
    start = time.process_time()
    grade = verify(GOLD, rf"\boxed{{{answer}}}", deadline=0.5)
    assert time.process_time() - start < 2  # seconds of CPU, of which it needs a hundredth
    assert (grade.score, grade.status in ("wrong", "unparsed", "timeout", "crashed", "no_answer")) == (0.0, True)
    for text in (f"Answer: {answer}", answer, f"<answer>{answer}"):
        start = time.process_time()
        assert not (isinstance(outcome := read(GOLD, text), Grade) and outcome.score)
        assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "piece",
    [
        "9",
        "1,",
        "(1 ",
        "1 or ",
        r"\boxed{",
        r"\boxed{1}",
        "{",
        "}",
        "$",
        "$\n",
        "$1$",
        r"\(",
        r"\frac{",
        "answer is ",
        "<answer>",
        "####",
        "1 1/",
        r"\text{",
        "final answer is ",
        "(A)",
        "* ",
        " ",
        "\n",
        "½",
        "1\\,",
    ],
)
def test_reading_takes_time_linear_in_the_text(piece):
    for gold in ("5", GOLD, "B"):
        runs: dict[int, list[float]] = {20_000: [], 80_000: []}
        for size in [*runs] * 5:  # in turns, so that both meet what else the machine does
            text = piece * (size // len(piece))
            start = time.process_time()
            read(gold, text)
            runs[size].append(time.process_time() - start)
        short, long = map(min, runs.values())
        assert long < 9 * max(short, 1e-3)  # 4 if linear, 16 if quadratic


def test_threads_share_the_workers(pool):
    with ThreadPoolExecutor(8) as threads:
        grades = list(threads.map(lambda n: verify(f"x+{n}", rf"\boxed{{{n % 7} + x}}").score, range(28)))
    assert grades == [float(n < 7) for n in range(28)]
    assert 1 <= len(pool.pids()) <= pool.size


def test_the_event_loop_runs_on_while_a_worker_compares(pool):
    async def both() -> tuple[str, int]:
        grading = asyncio.create_task(verify_async(GOLD, POWER_TOWER, deadline=1.0))
        ticks = 0
        while not grading.done():
            ticks += 1
            await asyncio.sleep(0.01)
        return (await grading).status, ticks

    status, ticks = asyncio.run(both())
    assert status == "timeout"
    assert ticks > 5


def test_a_batch_keeps_its_order(pool):
    pairs = [("5", "5"), (GOLD, RIGHT), ("7", "8"), (GOLD, r"\boxed{x^2}"), (GOLD, RIGHT), (GOLD, "")]
    assert [g.status for g in verify_many(pairs)] == ["correct", "correct", "wrong", "wrong", "correct", "no_answer"]
    assert verify_many(pairs) == [verify(*pair) for pair in pairs]
    assert verify_many([]) == []
    with pytest.raises(SettingError, match="where: unknown value"):
        verify_many(pairs, where="nowhere")


def test_a_forked_child_has_workers_of_its_own(pool):
    assert verify(GOLD, RIGHT).score == 1
    mine = pool.pids()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:  # no test code may run on in the child
        try:
            right = verify(GOLD, RIGHT).score == 1 and verify(GOLD, r"\boxed{x}").score == 0
            own = not set(workers.pool().pids()) & set(mine)
            os.write(send, str([right, own, workers.pool().pids()]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    right, own, pids = eval(os.read(receive, 1000).decode())
    os.close(receive)
    os.close(send)
    assert (right, own) == (True, True)
    assert verify(GOLD, RIGHT).score == 1
    assert pool.pids() == mine
    for pid in pids:
        wait_until(lambda pid=pid: not alive(pid))


def test_an_idle_worker_that_died_is_replaced_without_a_trace(pool):
    assert verify(GOLD, RIGHT).score == 1
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert verify(GOLD, RIGHT).score == 1


def test_a_worker_is_bounded_and_sees_no_secret_and_no_torch(pool, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hidden")
    assert verify(GOLD, RIGHT).score == 1
    (pid,) = pool.pids()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert str(workers.MEMORY) in next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert "hidden" not in Path(f"/proc/{pid}/environ").read_text()
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


SCRIPT = textwrap.dedent(
    r"""
    import os, sys, threading
    from llm_gym.envs.grading import verify, workers
    print(verify("x+1", r"\boxed{1+x}").score)  # no `if __name__ == "__main__"` here
    if sys.argv[1] == "busy":
        case = ("x", r"\boxed{9^{9^{9^{9}}}}")
        threading.Thread(target=lambda: verify(*case, deadline=4.0), daemon=True).start()
        while workers.pool()._idle:
            pass
    print(*workers.pool().pids(), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    """
)


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("end", ["returns", "killed"])
def test_no_worker_outlives_its_process(tmp_path, state, end):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    here = str(Path(workers.__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": here, "LLM_GYM_GRADERS": "1"}
    run = subprocess.run(
        [sys.executable, str(path), state, end],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert run.stdout.startswith("1.0\n"), run.stderr
    (pid,) = map(int, run.stdout.split()[1:])
    if end == "returns":
        assert (run.returncode, run.stderr) == (0, "")
        assert not alive(pid)
    else:
        wait_until(lambda: not alive(pid))


def test_a_worker_that_cannot_start_says_why(pool, monkeypatch):
    monkeypatch.setattr(workers, "MEMORY", 20 << 20)
    with pytest.raises(SettingError, match="grading: a worker process could not start"):
        verify(GOLD, RIGHT)
    assert pool.pids() == []
