"""Wheel, sdist -> wheel and editable install hold the same working package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import llm_gym
where = pathlib.Path(llm_gym.__file__).parent
assert where == pathlib.Path(sys.argv[1]) / "llm_gym", where
for module in pkgutil.walk_packages([str(where)], "llm_gym."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import gymnasium
env = gymnasium.make("llm_gym/Arithmetic-v0")
env.reset(seed=0)
gymnasium.make("llm_gym/GSM8K-v0", dataset="sample").reset(seed=0)
"""

pytestmark = pytest.mark.heavy


def run(*command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ with an sdist and the wheel built from it, plus direct/ with the wheel built from the checkout."""
    out = tmp_path_factory.mktemp("built")
    source = out / "source"
    run("git", "clone", "-q", str(ROOT), str(source), cwd=out)
    run(sys.executable, "-m", "build", "-q", "--outdir", str(out / "dist"), cwd=source)
    run(sys.executable, "-m", "build", "-q", "--wheel", "--outdir", str(out / "direct"), cwd=source)
    return out


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("RECORD")}


def test_sdist_and_checkout_make_the_same_wheel(built: Path) -> None:
    (via_sdist,), (direct,) = (built / "dist").glob("*.whl"), (built / "direct").glob("*.whl")
    assert names(via_sdist) == names(direct)
    assert {"llm_gym/py.typed", "llm_gym/embedded/model.safetensors"} <= names(direct)
    assert not any(name.startswith(("envs/", "harness/", "tests/")) for name in names(direct))


def test_every_module_imports_from_the_wheel_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n" + IMPORT_ALL
    run(sys.executable, "-c", code, str(target), cwd=tmp_path)


@pytest.mark.soak  # every run of CI begins with one
def test_an_editable_install_is_the_checkout(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    source = built / "source"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target))
    run(*pip, "-e", str(source), cwd=tmp_path)
    first = f"import site; sys.path.insert(0, {str(target)!r}); site.addsitedir({str(target)!r})\n"
    run(sys.executable, "-S", "-c", _without_site_packages() + first + IMPORT_ALL, str(source), cwd=tmp_path)


def _without_site_packages() -> str:
    """Puts the dependencies on the path without running their .pth files (another editable install of ours)."""
    return f"import sys; sys.path += {[p for p in sys.path if p.endswith('site-packages')]!r}\n"


def test_the_doors_open_on_the_rooms() -> None:
    for door in ("envs", "harness"):
        assert (ROOT / door).resolve() == ROOT / "llm_gym" / door
