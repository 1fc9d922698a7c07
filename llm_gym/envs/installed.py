"""Environments that installed packages announce, by an entry point of the group `llm_gym.environments`.

A package's pyproject.toml:

    [project.entry-points."llm_gym.environments"]
    games = "my_pkg.environments"             # a module that registers ids when it is imported
    more = "my_pkg.environments:register"     # or a function that does when it is called
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points

import gymnasium

from llm_gym.errors import FAULTS, described

GROUP = "llm_gym.environments"
FOUND: dict[str, str] = {}
"""Id that an entry point registered -> the package."""
_done: set[tuple[str, str]] = set()


def register_installed() -> None:
    """Lets every installed package register its environments, once; a package that fails is named in a warning."""
    if not any(_announced(folder) for folder in sys.path):
        return
    for entry in entry_points(group=GROUP):
        key = entry.name, entry.value
        if key in _done or _is_being_imported(entry.module):
            continue
        _done.add(key)
        _register(entry)


def _register(entry: EntryPoint) -> None:
    """Lets one entry point register its environments."""
    package = entry.dist.name if entry.dist is not None else entry.module
    before = set(gymnasium.registry)
    try:
        loaded = entry.load()
        if entry.attr:
            loaded()
    except FAULTS as error:
        warnings.warn(f"{package}: its environments cannot be registered: {described(error)}", stacklevel=4)
    FOUND.update(dict.fromkeys(gymnasium.registry.keys() - before, package))


def _announced(folder: str) -> bool:
    """Whether an entry point of the group is installed in a folder; several times as fast as the library's search."""
    try:
        names = [name for name in os.listdir(folder or ".") if name.endswith((".dist-info", ".egg-info"))]
    except OSError:  # a zip file, or nothing
        return False
    return any(_holds_group(os.path.join(folder, name, "entry_points.txt")) for name in names)


def _holds_group(file: str) -> bool:
    """Whether a file of entry points has the group."""
    try:
        with open(file, "rb") as opened:
            return f"[{GROUP}]".encode() in opened.read()
    except OSError:
        return False


def _is_being_imported(module: str) -> bool:
    """Whether it is what imports us: it registers its environments itself, or is asked the next time."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
