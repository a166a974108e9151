"""Start fresh Python interpreters that run one function of the library."""

from __future__ import annotations

import marshal
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import spawn, util
from pathlib import Path
from typing import Any

from keisei.child.process import HELD_SIGNALS
from keisei.exceptions import ManagerStateError
from keisei.ipc.memory import anonymous_file

_CODE = (
    "import marshal, sys; "
    "sys.path[:], module, function, args = marshal.load(open({fd}, 'rb')); "
    "getattr(__import__(module, fromlist=['']), function)(*args)"
)
"""The import path is set before the package is imported: it may be the only way to find it."""
_REMEDY = (
    "name one that has keisei by multiprocessing.set_executable(path) before the pool is started, "
    "or use backend='inline'"
)


def start(path: Sequence[str], entry: str, args: Sequence[Any], fds: Sequence[int]) -> int:
    """Start an interpreter that calls ``entry``; return its pid.

    Args:
        path: Its ``sys.path``, absolute or relative to the working directory.
        entry: ``module.function``.
        args: Numbers, strings, and tuples, lists and mappings of them.
        fds: Descriptors that it inherits; the caller keeps its own.

    Raises:
        OSError: There is no room for a process.
    """
    # What it is told is data, never code: a path may hold anything, and be long.
    told = anonymous_file("keisei-interpreter")
    try:
        module, _, function = entry.rpartition(".")
        with open(told, "wb", closefd=False) as stream:
            marshal.dump((list(path), module, function, tuple(args)), stream)
        os.lseek(told, 0, os.SEEK_SET)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as "spawn" does
        command = [os.fsdecode(_executable()), *flags, "-c", _CODE.format(fd=told)]
        with _signals_held():
            pid: int = util.spawnv_passfds(os.fsencode(command[0]), command, [told, *fds])
    finally:
        os.close(told)
    return pid


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start a process with signals blocked that it cannot take before it has prepared itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _executable() -> str | bytes:
    """Return what multiprocessing starts processes with, "" for nothing."""
    return spawn.get_executable() or ""


def require_interpreter() -> None:
    """Raise if what would be started is no Python interpreter.

    Starting it all the same may start the whole application again, and again from there.

    Raises:
        ManagerStateError: The application is frozen, or embeds Python, or there is no executable.
    """
    executable = os.fsdecode(_executable())
    is_own = os.fsencode(executable) == os.fsencode(sys.executable or "")
    if is_own and getattr(sys, "frozen", False):
        raise ManagerStateError(
            f"this application is frozen: {executable!r} is no Python interpreter but the "
            f"application itself, so workers cannot be started with it; {_REMEDY}"
        )
    if shutil.which(executable) is None:
        raise ManagerStateError(
            f"workers need a Python interpreter, and {executable!r} (sys.executable, or what "
            f"multiprocessing was told) cannot be run; {_REMEDY}"
        )
    if is_own and _is_this_program(executable) and not _is_an_interpreter(executable):
        raise ManagerStateError(
            f"{executable!r} embeds Python and would be started again in place of an interpreter; "
            f"{_REMEDY}"
        )


def _is_this_program(executable: str) -> bool:
    """Return whether ``executable`` is the program that this process runs."""
    try:
        return Path("/proc/self/exe").samefile(executable)
    except OSError:
        return False


def _is_an_interpreter(executable: str) -> bool:
    """Tell a Python from a program that embeds one, by its arguments and its name."""
    return bool(sys.orig_argv) and "py" in Path(executable).name.lower()
