"""92 snippets that break a plain Jupyter tool: each must end as written beside it, in every tier this machine has."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sandbox_tiers import DEALT, nothing_left

from llm_gym.envs.tools.sandbox import CellResult, Limits, PythonSession

Results = list[CellResult]
LIMITS = Limits(grace=0.5)


def says(*words: str, status: str = "") -> Callable[[Results], bool]:
    """The last cell's output holds one of the words (a regular expression), and has the status if one is given."""
    return lambda r: bool(re.search("|".join(words), r[-1].output)) and status in ("", r[-1].status)


def is_(output: str) -> Callable[[Results], bool]:
    return lambda r: r[-1].output.rstrip("\n") == output and r[-1].status == "ok"


def died(r: Results) -> bool:
    return r[-1].status == "died" and r[-1].lost


def late(r: Results) -> bool:
    return r[-1].status == "timeout"


def killed(r: Results) -> bool:
    return r[-1].status == "timeout" and r[-1].lost


def fails(r: Results) -> bool:
    return r[-1].status == "error" and "Traceback" in r[-1].output


def short(r: Results) -> bool:
    return all(len(x.output) < LIMITS.output + 200 for x in r)


# What each snippet must come to. "state kept" and "nothing left" are checked for all.
EXPECTED: dict[str, Callable[[Results], bool]] = {
    "abort": died,
    "close_fds": died,
    "execv": died,
    "quit_builtin": lambda r: "quit() is off" in r[1].output and r[2].output == "1\n",
    "segfault_ctypes": died,
    "segfault_quiet": lambda r: died(r) and r[0].output.startswith("hello\n"),
    "sys_exit": lambda r: r[0].output.startswith("a\n") and "SystemExit" in r[0].output and not r[0].lost,
    "html_js": says("<IPython.core.display.HTML object>"),
    "matplotlib": says("<Figure size", "No module named 'matplotlib'"),
    "numpy_big": says(r"\.\.\.,"),
    "pandas_repr": says(r"\.\.  \.\.\.", r"\[100 rows x 2 columns\]"),
    "update_display": lambda r: "v1" in r[0].output and r[0].output.rstrip("\n").endswith("b"),
    "async_gather": is_("[0, 1, 2]"),
    "broken_str_exc": lambda r: r[0].status == "error" and "E" in r[0].output,
    "deep_parens": says("SyntaxError", "MemoryError", status="error"),
    "empty_code": is_(""),
    "exc_deep_traceback": lambda r: "ValueError: deep" in r[0].output and short(r),
    "excepthook_swallow": lambda r: r[-1].output == "after\n",
    "generator_exit": says("GeneratorExit", status="error"),
    "huge_source": lambda r: r[0].status in ("ok", "too_long"),
    "import_missing": says("ModuleNotFoundError: No module named 'nosuchmodule_xyz'", status="error"),
    "kbdint_raised": says("KeyboardInterrupt: mine", "KeyboardInterrupt", status="error"),
    "nul_in_source": says("SyntaxError", "ValueError", "null byte", status="error"),
    "smart_quotes": says("SyntaxError: invalid character '“'", status="error"),
    "zero_width_in_code": says("SyntaxError: invalid non-printable character", status="error"),
    "cron_at": says(r"^[1-9]"),
    "daemon_double_fork": is_("daemonised"),
    "popen_left": is_("left"),
    "popen_then_exit": died,
    "prctl_subreaper_daemon": is_("ok"),
    "bash_bg": lambda r: r[0].status == "ok",
    "bash_cell": lambda r: "hi" in r[0].output and "err" in r[0].output and r[0].status == "error",
    "env_magic": lambda r: "SECRET" not in r[0].output and "HOME" in r[0].output,
    "help_magic": lambda r: not r[0].lost,
    "history_leak": is_("False"),
    "reset_magic": says("NameError", status="error"),
    "ansi_colours": is_("red "),
    "c_printf": lambda r: r[0].output.startswith("from C\n"),
    "chat_tokens": says(re.escape("<|im_end|>"), status="ok"),  # neutralised when encoded, not here
    "fake_tool_tags": says("</tool_response>", status="ok"),
    "fd1_binary": lambda r: "\ufffd\ufffd raw \ufffd bytes" in r[0].output and "raw err" in r[0].output,
    "flush_20k": lambda r: r[0].output.startswith("0\n1\n") and r[0].output.endswith("19999\n") and short(r),
    "generator_value": says("^<generator object <genexpr> at 0x"),
    "huge_repr": lambda r: r[0].output.startswith("'zz") and r[0].output.rstrip().endswith("zz'") and short(r),
    "late_timer_output": is_("next"),
    "lone_surrogate_exception": says(re.escape("\\udcff boom"), status="error"),
    "long_line_5mb": lambda r: "characters left out" in r[0].output and short(r),
    "null_bytes": is_("a\\x00b\\x00c"),
    "semicolon": is_(""),
    "stdout_buffer_binary": lambda r: "bin" in r[0].output or r[0].status == "error",
    "stdout_stderr_interleaved": lambda r: all(f"{k} {i}" in r[0].output for k in ("out", "err") for i in range(5)),
    "subprocess_echo": lambda r: "from child" in r[0].output and "end" in r[0].output,
    "cpu_hog_procs": is_("started"),
    "cpu_hog_threads": is_("started"),
    "inode_spam": is_("ok"),
    "memory_bomb": lambda r: "MemoryError" in r[0].output or died(r),
    "shm_fill_bounded": says("ok", "PermissionError"),
    "clock_change": says("PermissionError"),
    "connection_file_write": lambda r: r[0].status in ("ok", "error"),
    "cwd_shadow_module": is_("clean"),
    "docker_sock": is_("[]"),
    "home_write_startup": is_("clean"),
    "kill_all": lambda r: died(r) or r[0].status in ("ok", "error"),
    "outside_socket": lambda r: r[0].status == "error" and "timed out" not in r[0].output,
    "parent_cmdline": lambda r: "SECRET" not in r[0].output,
    "pip_install": lambda r: not r[0].output.startswith("0"),
    "proc_sysrq": lambda r: "True" not in r[0].output,
    "setuid_sudo": lambda r: not r[0].output.startswith("0"),
    "sibling_hijack": lambda r: "TOPSECRET" not in r[0].output,
    "sibling_port_scan": says("loopback: 0", "Error", "loopback: [1-9]"),
    "userns_escape": lambda r: not r[0].output.startswith("0") and r[0].output != "",
    "out_cache": lambda r: r[1].output == "84\n" and "42" in r[2].output,
    "random_seed": lambda r: r[0].status == "ok",
    "state_across_turns": is_("42"),
    "input_call": says("EOFError", "StdinNotImplementedError", status="error"),
    "pdb_breakpoint": is_("1"),
    "gc_frames_search": says(r"^0 "),
    "settrace_hook": is_("2"),
    "spoof_idle": is_("next"),
    "spoof_reply_ok": lambda r: r[0].status in ("ok", "error"),
    "spoof_stream": lambda r: "FORGED" not in r[0].output,
    "stdout_closed": lambda r: not r[1].lost,
    "async_cpu_task": late,
    "exact_limit": is_("made it"),
    "finally_hang": killed,
    "regex_catastrophic": late,
    "repr_inf_loop": late,
    "sigint_ignored": killed,
    "sigstop_self": killed,
    "sigterm_ignored": killed,
    "sum_range_c": killed,
    "swallow_kbdint": lambda r: killed(r) and "nope KeyboardInterrupt" in r[0].output,
}
LATE = {"timeout": 1.0}
"""Seconds of the cells that have no end, by category; none other may be late, however busy the machine."""
PATIENT = {"exact_limit": 60.0, "swallow_kbdint": 3.0}
"""Those of two that must have begun, and have said something before they are killed."""


def play(case: dict[str, Any], tier: str, backend: str) -> Results:
    """The results of the cells of one case; of the second session, or of a last `next` cell, where it has those."""
    seconds = PATIENT.get(case["name"], LATE.get(case["category"], 60.0))
    with PythonSession(backend, tier, Limits(grace=3.0) if case["name"] in PATIENT else LIMITS) as session:
        results = [session.run(cell, timeout=seconds) for cell in case["cells"]]
        if case.get("late"):
            time.sleep(2.5)
            results.append(session.run("print('next')", timeout=60))
        after = session.run("print('alive')", timeout=60)
        usable = {"stdout_closed": True}.get(case["name"], "alive\n" in after.output and after.status == "ok")
        assert usable, f"the next cell gave {after}"
    if "second_kernel" in case:
        with PythonSession(backend, tier, LIMITS) as second:
            results.append(second.run(case["second_kernel"]))
    return results


@pytest.mark.parametrize(("tier", "backend"), DEALT)
def test_every_case_meets_its_expectation(
    tier: str, backend: str, shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [json.loads(line) for line in shared("data/pytool/cases.jsonl").open()]
    assert {case["name"] for case in cases} == set(EXPECTED)
    monkeypatch.setenv("TRAINER_SECRET", "TOPSECRET")

    def judge(case: dict[str, Any]) -> str:
        try:
            results = play(case, tier, backend)
        except Exception as error:
            return f"{case['name']}: {error!r}"
        shown = [(r.status, r.lost, r.output[-300:]) for r in results]
        return "" if EXPECTED[case["name"]](results) else f"{case['name']} ({case['expectation']}): {shown}"

    with nothing_left(), PythonSession(backend, tier) as victim, ThreadPoolExecutor(6) as threads:
        victim.run("victim_secret = 'TOPSECRET'")
        wrong = [text for text in threads.map(judge, cases) if text]
        assert victim.run("victim_secret").output == "'TOPSECRET'\n"
    assert not wrong, "\n".join(wrong)
