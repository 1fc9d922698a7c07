"""What multiprocessing keeps in /dev/shm, for sessions that may not see that folder: it is the whole machine's.

Semaphores become unnamed ones in memory shared with forked children, shared memory becomes files of the session's own.
Processes that are forked need no more; those that are spawned would look for a name.
"""

from __future__ import annotations

import _multiprocessing  # type: ignore[import-not-found]
import ctypes
import errno
import mmap
import os
import threading
import time
from typing import Any

RECURSIVE = 0
"""The kind of lock that its holder may take again; the others are semaphores."""
_SIZE = 32
"""Bytes of a sem_t on 64-bit Linux."""
_libc = ctypes.CDLL(None, use_errno=True)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SemLock:
    """The interface of `_multiprocessing.SemLock`."""

    SEM_VALUE_MAX = _multiprocessing.SemLock.SEM_VALUE_MAX

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        self.kind, self.maxvalue, self.name = kind, maxvalue, None
        self._memory = mmap.mmap(-1, _SIZE)
        self._sem = ctypes.c_char.from_buffer(self._memory)
        self.handle = ctypes.addressof(self._sem)
        self._held, self._owner = 0, 0
        self._call("sem_init", 1, ctypes.c_uint(value))

    def _call(self, name: str, *arguments: Any) -> bool:
        """Whether the call succeeded; False where it would have to wait, or has waited long enough."""
        while getattr(_libc, name)(ctypes.byref(self._sem), *arguments) < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.ETIMEDOUT):
                return False
            if code != errno.EINTR:  # a signal's handler has run, and has not raised
                raise OSError(code, os.strerror(code))
        return True

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Takes it; whether it could be taken."""
        if self.kind == RECURSIVE and self._is_mine():
            self._held += 1
            return True
        if not self._call("sem_trywait"):
            if not block:
                return False
            if timeout is None:
                self._call("sem_wait")
            else:
                until = time.time() + max(0.0, timeout)
                end = _Time(int(until), int(until % 1 * 1e9))
                if not self._call("sem_timedwait", ctypes.byref(end)):
                    return False
        self._held, self._owner = self._held + 1, threading.get_ident()
        return True

    def release(self) -> None:
        """Gives it back."""
        if self.kind == RECURSIVE:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._held > 1:
                self._held -= 1
                return
        elif self._get_value() >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self._held -= 1
        self._call("sem_post")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        value = ctypes.c_int()
        self._call("sem_getvalue", ctypes.byref(value))
        return max(0, value.value)

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def _after_fork(self) -> None:
        self._held = 0


def install(folder: str) -> None:
    """Has multiprocessing use these; files of shared memory lie in `folder`."""
    import _posixshmem  # type: ignore[import-not-found]
    from multiprocessing import heap

    def path(name: str) -> str:
        return os.path.join(folder, "shm" + name.replace("/", "-"))

    module: Any = _posixshmem
    module.shm_open = lambda path_, flags, mode=0o777: os.open(path(path_), flags | os.O_CLOEXEC, mode)
    module.shm_unlink = lambda path_: os.unlink(path(path_))
    replaced: Any = _multiprocessing
    replaced.SemLock = SemLock
    arena: Any = heap.Arena
    arena._dir_candidates = []
