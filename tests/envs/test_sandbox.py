"""Sessions: state, output, deadlines, isolation, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import psutil
import pytest
from sandbox_tiers import (
    BACKENDS,
    DEALT,
    FULL_TIERS,
    ONE_OF_EACH,
    TIERS,
    descriptors,
    family,
    nothing_left,
    processes,
    sleeper,
    sleepers,
    within,
)

from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import Limits, PythonSession, isolation, pool
from llm_gym.envs.tools.sandbox.guest import confine
from llm_gym.envs.tools.sandbox.guest.wire import poll
from llm_gym.envs.tools.sandbox.sandbox import Handle, SandboxError
from llm_gym.errors import SettingError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `tier` meets all of them, one of `backend` too; one of both meets the pairs that fall to this user."""
    given = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    match [name for name in ("tier", "backend") if name in metafunc.fixturenames and name not in given]:
        case ["tier", "backend"]:
            metafunc.parametrize(("tier", "backend"), DEALT)
        case [name]:
            metafunc.parametrize(name, {"tier": TIERS, "backend": BACKENDS}[name])


@pytest.fixture(scope="module", autouse=True)
def _end() -> object:
    yield
    sandbox.shutdown()


def test_state_persists_within_a_session_and_not_between_two(tier: str, backend: str) -> None:
    with PythonSession(backend, tier) as one, PythonSession(backend, tier) as two:
        assert one.run("x = 20").output == ""
        assert one.run("print('a'); x + 1").output == "a\n21\n"
        assert "NameError" in two.run("x").output
        assert one.run("open('note', 'w').write('mine'); 1").status == "ok"
        assert "FileNotFoundError" in two.run("open('note')").output


def test_packages_may_lie_where_the_scratch_folder_is(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment below /tmp: the session's own /tmp must not cover it."""
    (tmp_path / "odd_package.py").write_text("VALUE = 7\n")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    known = isolation.packages()
    monkeypatch.setattr(isolation, "packages", lambda: [*known, str(tmp_path)])
    sandbox.shutdown()
    try:
        with PythonSession("worker", tier) as session:
            assert session.run("import odd_package; print(odd_package.VALUE)").output == "7\n"
    finally:
        sandbox.shutdown()


def test_packages_are_found_in_every_layer_of_the_environment_and_projects_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"base/site-packages": "", "dist-packages": "", "target": "a-1.0.dist-info", "project": "project.egg-info"}
    folders = [tmp_path / name for name in names]
    for folder, inside in zip(folders, names.values(), strict=True):
        (folder / inside).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["", *sys.path, *map(str, folders), str(tmp_path / "nowhere")])
    found = isolation.packages()
    assert found[-3:] == [str(folder) for folder in folders[:3]]
    assert sysconfig.get_path("purelib") in found
    assert str(folders[3]) not in isolation.visible()
    assert os.getcwd() not in found


LAYERED = """
import sys
from llm_gym.envs.tools import sandbox
with sandbox.PythonSession("worker", sys.argv[1]) as session:
    print(session.run("import numpy; 6 * 7"))
sandbox.shutdown()
"""


@pytest.mark.parametrize("tier", ONE_OF_EACH)
def test_a_session_works_where_packages_come_from_another_environment(tier: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "layer", symlinks=True)
    python = tmp_path / "layer/bin/python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(command, text=True).strip())
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    project = Path(sandbox.__file__).parents[4]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    command = [python, "-c", LAYERED, tier]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "output='42\\n', status='ok'" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("tier", ONE_OF_EACH)
def test_a_sandbox_that_cannot_import_says_so(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython/__init__.py").write_text("raise ImportError('broken here')\n")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    known = isolation.packages()
    monkeypatch.setattr(isolation, "packages", lambda: [str(tmp_path), *known])
    sandbox.shutdown()
    with pytest.raises(SandboxError, match="could not start: ImportError: broken here"):
        PythonSession("worker", tier)


def test_an_error_is_shown_as_a_short_traceback(tier: str, backend: str) -> None:
    with PythonSession(backend, tier) as session:
        result = session.run("def f():\n    return 1 / 0\nf()")
    assert result.status == "error"
    assert not result.lost
    lines = result.output.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert len(lines) < 8


def test_output_keeps_head_and_tail_within_its_bound(tier: str, backend: str) -> None:
    with PythonSession(backend, tier, Limits(output=200)) as session:
        result = session.run("print('first'); print('x' * 3_000_000); print('last')")
    assert result.output.startswith("first\n")
    assert result.output.endswith("last\n")
    assert "characters left out" in result.output
    assert len(result.output) < 300


PATIENT = Limits(grace=60)
"""Where an interrupt must be enough, however busy the machine."""
BEGUN = 2.0
"""Seconds in which a cell has begun what it does on a busy machine."""


def test_a_late_cell_is_interrupted_and_its_state_kept(tier: str, backend: str) -> None:
    with PythonSession(backend, tier, PATIENT) as session:
        session.run("x = 7")
        result = session.run("print('begun', flush=True)\nwhile True: pass", timeout=BEGUN)
        assert (result.status, result.lost) == ("timeout", False)
        assert result.output.startswith("begun\n")
        assert result.output.endswith("variables are kept]")
        assert session.run("x").output == "7\n"


def test_a_cell_that_will_not_stop_costs_the_session_its_state(tier: str, backend: str) -> None:
    with PythonSession(backend, tier, Limits(grace=0.3)) as session:
        session.run("x = 7")
        result = session.run("import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass", timeout=0.3)
        assert (result.status, result.lost) == ("timeout", True)
        assert result.output.endswith("all variables are gone]")
        assert "NameError" in session.run("x").output


def test_a_death_is_noticed_at_once(tier: str, backend: str) -> None:
    with PythonSession(backend, tier) as session:
        result = session.run("import os; print('so far'); os._exit(3)", timeout=300)
        assert (result.status, result.lost) == ("died", True)
        assert result.output.startswith("so far\n")
        assert result.seconds < 60
        assert session.run("1").output == "1\n"


def test_a_long_cell_is_refused(backend: str) -> None:
    with PythonSession(backend, limits=Limits(code=1000)) as session:
        result = session.run("#" * 1001)
        assert (result.status, result.lost) == ("too_long", False)
        assert "1,001 bytes" in result.output
        assert session.run("#" * 1000).status == "ok"


def test_a_seed_makes_random_numbers_repeat(tier: str, backend: str) -> None:
    cell = "import random, numpy; random.random(), float(numpy.random.rand()), hash('a')"
    outputs = []
    for seed in (1, 1, 2, None, None):
        with PythonSession(backend, tier, seed=seed) as session:
            outputs.append(session.run(cell).output)
    assert outputs[0] == outputs[1]
    assert len(set(outputs)) == 4


def test_cycles_are_collected_and_nothing_is_imported_again(backend: str) -> None:
    """Pages that a session writes to are no longer the zygote's."""
    with PythonSession(backend) as session:
        session.run(
            "import weakref\nclass Ring: pass\nring = Ring(); ring.ring = ring; seen = weakref.ref(ring); del ring"
        )
        assert session.run("x = [[] for _ in range(10_000)]\nseen() is None").output == "True\n"
        private = "next(int(line.split()[1]) for line in open('/proc/self/smaps_rollup') if 'Private_Dirty' in line)"
        assert int(session.run(private).output) < 24_000


def test_limits_bound_memory_disk_processes_and_descriptors(tier: str, backend: str) -> None:
    limits = Limits(memory=2 << 30, disk=8 << 20, processes=20, descriptors=64)
    with PythonSession(backend, tier, limits) as session:
        assert "MemoryError" in session.run("x = bytearray(3 << 30)").output
        assert "OSError" in session.run("open('big', 'wb').write(b'x' * (9 << 20))").output
        assert "OSError" in session.run("[open('/dev/null') for _ in range(100)]").output
        bomb = "import os, time\nn = 0\ntry:\n    while n < 3000:\n        if os.fork() == 0: time.sleep(6000)\n"
        bomb += "        n += 1\nexcept OSError as error: print('stopped', n < 3000)"
        assert (
            "stopped True" in session.run(bomb, timeout=600).output
        )  # a thousand, where a user's are counted together
    with PythonSession(backend, tier, limits) as session:  # and the bomb is gone
        assert session.run("1").output == "1\n"


def test_every_session_has_its_own_count_of_processes(tier: str) -> None:
    """But for an ordinary user in the Landlock tier, where the machine refuses user namespaces."""
    counted = os.geteuid() == 0 or tier != "landlock" or confine.may_have_user_namespace()
    with PythonSession("worker", tier) as session:
        output = session.run("import resource; resource.getrlimit(resource.RLIMIT_NPROC)[0]").output
    assert (output == "64\n") == counted


@pytest.mark.parametrize("tier", FULL_TIERS)
def test_the_scratch_folder_has_a_size(tier: str, backend: str) -> None:
    cell = "n = 0\ntry:\n  for i in range(100):\n    open(f'/{D}/f{i}', 'wb').write(b'x' * (1 << 20)); n += 1\n"
    cell += "except OSError as error: print(error.errno, n < 9)"
    with PythonSession(backend, tier, Limits(disk=8 << 20)) as session:
        for folder in ("tmp", "dev/shm", "tmp/work"):
            assert session.run(cell.replace("{D}", folder)).output == "28 True\n"


def test_everything_the_episode_started_is_gone_after_close(tier: str, backend: str) -> None:
    session = PythonSession(backend, tier)
    session.run(sleeper())
    assert len(sleepers()) == 3
    session.close()
    session.close()
    assert not sleepers()
    with pytest.raises(RuntimeError, match="closed"):
        session.run("1")


def test_a_forgotten_session_ends_with_its_object(tier: str) -> None:
    session = PythonSession("worker", tier)
    handle = session.held.handle
    assert handle is not None
    del session
    gc.collect()
    assert handle.ended


def test_many_sessions_leave_nothing(tier: str, backend: str) -> None:
    def episode() -> None:
        with PythonSession(backend, tier) as session:
            assert session.run("import os; os.getpid() > 0").output == "True\n"

    with nothing_left():
        others = processes()  # of earlier tests
        for _ in range(5):
            episode()
        assert within(60, lambda: len(processes() - others) == _settled(backend, tier))
        before = descriptors()
        for _ in range(40):
            episode()
        assert descriptors() <= before
        assert within(60, lambda: len(processes() - others) <= _settled(backend, tier))


def _settled(backend: str, tier: str) -> int:
    """The zygote (in a full tier with what it runs in, and its template) and the ready sessions' two each."""
    ready = sum(len(handles) for handles in pool.READY.values())
    return (1 if tier == "landlock" else 3) + 2 * ready


def test_a_dead_zygote_is_replaced(tier: str) -> None:
    with PythonSession("worker", tier) as session:
        pool.SANDBOXES[tier].process.kill()
        pool.SANDBOXES[tier].process.wait()
        with PythonSession("worker", tier) as other:
            assert other.run("2 + 2").output == "4\n"
        session.run("1")  # died, or not: but it answers


@pytest.mark.parametrize("tier", FULL_TIERS)
def test_a_dead_template_ends_the_sandbox_and_it_is_replaced(tier: str) -> None:
    with PythonSession("worker", tier) as session:
        session.run("x = 1")
        outermost, zygote, template = family(tier)
        template.kill()
        assert within(60, lambda: not zygote.is_running() and not pool.SANDBOXES[tier].alive())
        assert session.run("x").status == "died"
        assert session.run("2 + 2").output == "4\n"
        assert family(tier)[0] != outermost


@pytest.mark.parametrize("tier", FULL_TIERS)
def test_a_session_may_be_ended_before_it_has_begun(tier: str) -> None:
    """Its reaper is there, the session proper is not: the template then finds a dead namespace, and goes on."""
    with nothing_left():
        others = processes()  # of earlier tests
        PythonSession("worker", tier).close()
        box, (*_, template) = pool.SANDBOXES[tier], family(tier)
        template.suspend()
        handles = [box.spawn(Limits(), Handle) for _ in range(3)]
        for handle in handles:
            assert poll([handle.lease], 60)
            handle.take()  # its pidfd
            handle.end()
        template.resume()
        with PythonSession("worker", tier) as session:
            assert session.run("6 * 7").output == "42\n"
        for handle in [box.spawn(Limits(), Handle) for _ in range(20)]:  # wherever they are by then
            handle.end()
        assert within(60, lambda: len(processes() - others) == _settled("worker", tier))
        assert family(tier)[-1] == template


def test_an_interrupt_reaches_what_the_cell_waits_for(tier: str, backend: str) -> None:
    with PythonSession(backend, tier, PATIENT) as session:
        cell = "import subprocess; child = subprocess.Popen(['sleep', '1000']); child.wait()"
        assert session.run(cell, timeout=BEGUN).status == "timeout"
        assert session.run("child.wait(60)", timeout=60).status == "ok"


HELD = """
import os
links = []
for name in os.listdir("/proc/self/fd"):
    try: links.append(os.readlink(f"/proc/self/fd/{name}"))
    except FileNotFoundError: pass  # that of the listing
kinds = {link.split(":")[0] for link in links}
others = [name for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, os.getpid())]
opened = []
for name in ("mem", "environ", "maps", "auxv", "task/1/mem", "fd/0", "ns/pid", "ns/mnt", "exe", "root", "cwd"):
    path = f"/proc/1/{name}"
    try: os.readlink(path) if os.path.islink(path) else open(path, "rb").read(1)
    except OSError: continue
    opened.append(name)
print(sorted(kinds), sum(link.startswith("socket") for link in links), others, opened)
"""


@pytest.mark.parametrize("tier", FULL_TIERS)
def test_a_session_holds_and_sees_nothing_of_the_sandbox(tier: str) -> None:
    with PythonSession("worker", tier) as other, PythonSession("worker", tier) as session:
        assert session.run(HELD).output == "['/dev/null', '/memfd', 'socket'] 1 [] []\n"
        assert other.run(HELD).output == "['/dev/null', '/memfd', 'socket'] 1 [] []\n"


CRASHING = """
import os, sys, time
from llm_gym.envs.tools.sandbox import PythonSession
sessions = [PythonSession(sys.argv[2], sys.argv[1]) for _ in range(3)]
sessions[0].run(sys.argv[3])
child = os.fork()
if child == 0:
    time.sleep(60)  # inherited every descriptor, and outlives its parent
print(child, flush=True)
time.sleep(600)
"""


def test_a_killed_trainer_takes_everything_with_it(tier: str, backend: str) -> None:
    sandbox.shutdown()
    command = [sys.executable, "-c", CRASHING, tier, backend, sleeper()]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert trainer.stdout is not None
    child = int(trainer.stdout.readline())
    family = {p.pid for p in psutil.Process(trainer.pid).children(recursive=True)}
    trainer.kill()
    trainer.wait()
    try:
        assert len(family) > 6 + 3
        assert within(60, lambda: not any(map(psutil.pid_exists, family - {child})))
        assert not sleepers()
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.stdout.close()


def test_sessions_of_many_threads_do_not_meet(tier: str, backend: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def episode(i: int) -> bool:
        with PythonSession(backend, tier) as session:
            session.run(f"x = {i}")
            return all(session.run(f"x + {j}").output == f"{i + j}\n" for j in range(5))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(episode, range(24)))


def test_a_forked_child_has_no_part_in_its_parents_sessions() -> None:
    with PythonSession() as session:
        session.run("x = 1")
        pid = os.fork()
        if pid == 0:
            try:
                session.run("x")
            except RuntimeError:
                session.close()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert session.run("x").output == "1\n"


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(SettingError, match="'jupyter'|'worker'"):
        PythonSession("wroker")
    with pytest.raises(SettingError, match="sandbox: unknown value 'requird'; did you mean 'required'"):
        PythonSession(sandbox="requird")
    with pytest.raises(SettingError, match=r"limits\.memory: 0"):
        Limits(memory=0)


def test_required_refuses_a_machine_without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "REASONS", dict.fromkeys(pool.ORDER[:-1], "not here") | {"none": ""})
    assert sandbox.tier("auto").name == "none"
    with pytest.raises(SettingError, match="required.*landlock: not here"):
        sandbox.tier("required")
    with pytest.raises(SettingError, match="'namespaces' does not work here: not here"):
        sandbox.tier("namespaces")


def test_the_plain_tier_warns_loudly(caplog: pytest.LogCaptureFixture) -> None:
    with PythonSession(sandbox="none") as session:
        assert session.run("6 * 7").output == "42\n"
    assert "NO SANDBOX" in caplog.text


def test_the_interpreter_of_a_waiting_session_is_not_seen_by_ctrl_c() -> None:
    with PythonSession() as session:
        group = os.getpgid(pool.SANDBOXES[session.tier.name].process.pid)
        assert group != os.getpgid(0)
        assert session.held.handle.interrupt()  # type: ignore[union-attr]
        assert session.run("1").output == "1\n"
