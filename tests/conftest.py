"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# No test uses a model hub; where there is none, five attempts to reach it take 23 s.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No deadline: how long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("llm_gym", deadline=None)
hypothesis.settings.load_profile("llm_gym")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts its background jobs so, and every child inherits it; Ctrl-C is tested here.
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """No file of tests sees variables that an earlier one, or an engine in it, has set."""
    before = dict(os.environ)
    yield
    for name in (before.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


LONGEST = """
test_vllm_server test_ray test_nproc_engines test_vllm_train test_nproc test_python_sandbox test_ranks test_loops_nproc
test_gpu_form test_interrupt test_mutations test_vllm_models test_vllm_loops test_sandbox test_vllm_policy
test_vllm_lora test_examples test_mcp_servers test_grading_workers test_sandbox_moments test_export_chain
test_vllm_exit test_vllm_adapter test_distill_learns test_packaging test_sandbox_cases test_doctor_vllm
test_resume test_vllm_proof test_parallel test_random_configurations test_real_tokenizers test_budget
test_tool_formats test_sandbox_shell test_sandbox_cells test_cli_documented test_trl
""".split()
"""Files of 15 CPU seconds and more, their children's included."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the files, the longest come first: none is begun when the other workers are done."""
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where CI is set a heavy test that was skipped is a failure: the real parts must have run.

    Says too which sample was drawn, where a test records one.
    """
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    for name, value in dict(pair for report in reports for pair in report.user_properties).items():
        terminalreporter.line(f"{name}: {value}")
    if terminalreporter.config.getoption("dist", "no") != "no":
        _minutes(terminalreporter)
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _must_run(report)]
    if skipped and os.environ.get("CI"):
        terminalreporter.section("heavy tests skipped in CI: a failure")
        for report in skipped:
            terminalreporter.line(f"{report.nodeid}: {report.longrepr}")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _minutes(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that took longest, where several workers share them: the longest one ends no sooner however many."""
    seconds: Counter[str] = Counter()
    for report in (each for kind in terminalreporter.stats.values() for each in kind if hasattr(each, "duration")):
        seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"{sum(seconds.values()):.0f} s of tests in {len(seconds)} files; the longest:")
    for file, took in seconds.most_common(30):
        terminalreporter.line(f"{took:6.0f} s  {file}")


def _must_run(report: pytest.TestReport | pytest.CollectReport) -> bool:
    return ("heavy" in report.keywords or "tests/heavy" in report.nodeid) and "where_allowed" not in report.keywords
