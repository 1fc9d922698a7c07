"""The process-wide store of sandboxes and of sessions that are ready before anybody asks."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Hashable

from llm_gym.envs.tools.sandbox import isolation
from llm_gym.envs.tools.sandbox.guest import confine
from llm_gym.envs.tools.sandbox.guest.wire import poll
from llm_gym.envs.tools.sandbox.limits import Limits
from llm_gym.envs.tools.sandbox.sandbox import (
    START_SECONDS,
    Handle,
    Sandbox,
    SandboxError,
    block_of_uids,
    launch,
    scratch,
)
from llm_gym.errors import SettingError, unknown

logger = logging.getLogger(__name__)

ORDER = ("bubblewrap", "namespaces", "landlock", "none")
LEAST_READY = 2
"""As many sessions are kept ready at least; else as many as were ever in use at once, up to their `most_ready`."""
TRIES = 100
"""Sessions tried for one taker, where they die while they wait to be used: more than are kept ready."""

_lock = threading.RLock()
REASONS: dict[str, str] = {}
SANDBOXES: dict[str, Sandbox] = {}
READY: dict[Hashable, deque[Handle]] = {}
_in_use: dict[Hashable, int] = {}
_most: dict[Hashable, int] = {}


def missing(name: str) -> str:
    """Why this machine cannot isolate in the way `name`; empty if it can. Tried once, for real."""
    with _lock:
        if name not in REASONS:
            REASONS[name] = _try(name)
        return REASONS[name]


def _try(name: str) -> str:
    if name == "none":
        return ""
    if not sys.platform.startswith("linux"):
        return "only Linux has it"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "there is no program `bwrap` on the PATH"
    if name == "landlock" and not confine.landlock_abi():
        return "this kernel has no Landlock"
    base = scratch(isolation.TIERS[name])
    control, process = launch(isolation.TIERS[name], base, block_of_uids()[0], only_check=True)
    try:
        message = control.receive()[0] if poll([control], START_SECONDS) else None
    finally:
        control.close()
        process.wait()
    if message is None:
        return "its first process could not start"
    return str(message.get("why", "")).strip().rpartition("\n")[2]


def tier(sandbox: str = "auto") -> isolation.Tier:
    """The kind of isolation that `sandbox` means on this machine.

    Args:
        sandbox: `auto`: the best there is; `required`: the best, but not `none`; or a tier by name.

    Raises:
        SettingError: there is no such tier, or this machine does not allow it.
    """
    if sandbox in ORDER:
        if reason := missing(sandbox):
            raise SettingError(f"sandbox: {sandbox!r} does not work here: {reason}.")
        return isolation.TIERS[sandbox]
    if sandbox not in ("auto", "required"):
        raise SettingError(unknown("sandbox", sandbox, ("auto", "required", *ORDER)))
    found = next(name for name in ORDER if not missing(name))
    if found == "none" and sandbox == "required":
        reasons = "; ".join(f"{name}: {missing(name)}" for name in ORDER[:-1])
        raise SettingError(f"sandbox: 'required', but this machine allows none ({reasons}).")
    return isolation.TIERS[found]


def take(kind: type[Handle], chosen: isolation.Tier, limits: Limits) -> Handle:
    """A session that nobody has used, ready for its first cell; more are ordered for those to come.

    Raises:
        SandboxError: none could be started.
    """
    for _ in range(TRIES):
        handle = _next(kind, chosen, limits)
        try:
            handle.wait_ready()
            if handle.alive():
                return handle
        except ConnectionError:
            pass  # it had been ready, and died, perhaps with the sandbox
        except BaseException:
            handle.end()
            give_back(kind, chosen, limits)
            raise
        handle.end()
        give_back(kind, chosen, limits)
    raise SandboxError("sessions of the sandbox die before their first cell.")


def _next(kind: type[Handle], chosen: isolation.Tier, limits: Limits) -> Handle:
    """A session, perhaps not yet ready; it counts as in use."""
    key = (kind, chosen.name, limits)
    with _lock:
        sandbox = _sandbox(chosen)
        ready = READY.setdefault(key, deque())
        handle = ready.popleft() if ready else sandbox.spawn(limits, kind)
        _in_use[key] = _in_use.get(key, 0) + 1
        _most[key] = max(_most.get(key, 0), _in_use[key])
        with contextlib.suppress(SandboxError):  # it has just ended: who waits for the session will hear of it
            _order(ready, key, sandbox, limits, kind)
    return handle


def give_back(kind: type[Handle], chosen: isolation.Tier, limits: Limits) -> None:
    """One session fewer is in use. Where they are used in waves, those of the next wave start now."""
    key = (kind, chosen.name, limits)
    with _lock:
        _in_use[key] = max(0, _in_use.get(key, 0) - 1)
        if (sandbox := SANDBOXES.get(chosen.name)) is not None and key in READY and sandbox.alive():
            with contextlib.suppress(SandboxError):  # it has just ended: whoever takes a session will hear of it
                _order(READY[key], key, sandbox, limits, kind)


def _order(ready: deque[Handle], key: Hashable, sandbox: Sandbox, limits: Limits, kind: type[Handle]) -> None:
    """Orders sessions until enough are ready; does not wait for them."""
    while len(ready) < max(LEAST_READY, min(kind.most_ready, _most.get(key, 0))):
        ready.append(sandbox.spawn(limits, kind))


def _sandbox(chosen: isolation.Tier) -> Sandbox:
    sandbox = SANDBOXES.get(chosen.name)
    if sandbox is not None and not sandbox.alive():
        logger.warning("the sandbox (%s) ended; starting another.", chosen.name)
        _forget(chosen.name)
        sandbox = None
    if sandbox is None:
        if chosen.name == "none":
            logger.warning("NO SANDBOX for model-written code: %s", chosen.why)
        sandbox = SANDBOXES[chosen.name] = Sandbox(chosen)
    return sandbox


def _forget(name: str) -> None:
    for key in [key for key in READY if isinstance(key, tuple) and key[1] == name]:
        for handle in READY.pop(key):
            handle.end()
    SANDBOXES.pop(name).close()


def shutdown() -> None:
    """Ends every sandbox and every session in it. The next session starts afresh."""
    with _lock:
        for name in list(SANDBOXES):
            _forget(name)
        _in_use.clear()
        _most.clear()


def _after_fork() -> None:
    """A forked child has nothing to do with its parent's sessions: it only lets go of them."""
    global _lock
    _lock = threading.RLock()
    for sandbox in SANDBOXES.values():
        sandbox.control.close()
        sandbox.process.returncode = 0  # not our child
    for handle in (handle for handles in READY.values() for handle in handles):
        handle.abandon()
    SANDBOXES.clear()
    READY.clear()
    _in_use.clear()
    _most.clear()


atexit.register(shutdown)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
