"""What a new process takes over from the application as it is at that moment.

A fork server keeps the environment, the folder and the import path of its own start; a worker
that it forks is to have the application's of now, as if it were the application's own child.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TIME_ZONE = b"TZ"
FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
"""How a working directory is opened: also one that has been deleted, or cannot be read."""


def told(path: Sequence[str]) -> tuple[Any, ...]:
    """Describe this process's surroundings for ``take``, in values that ``marshal`` knows.

    Args:
        path: The import path to tell.
    """
    # list() of the names is one step; a variable may go away before it is read.
    values = ((name, os.environb.get(name)) for name in list(os.environb))
    environment = {name: value for name, value in values if value is not None}
    return environment, list(path), sys.dont_write_bytecode, sys.pycache_prefix


def take(what: tuple[Any, ...], folder: int | None) -> None:
    """Take over the surroundings that another process has ``told``.

    Args:
        what: They.
        folder: A descriptor of the working directory, which may have been deleted by now; the
            caller keeps it. ``None`` stays where this process is.
    """
    environment, path, sys.dont_write_bytecode, sys.pycache_prefix = what
    _take_environment(environment)
    if folder is not None:
        os.fchdir(folder)
    sys.path[:] = path
    importlib.invalidate_caches()  # files may be newer than what is known of their folders


@contextmanager
def in_a_folder() -> Iterator[bool]:
    """Leave, for the time being, a working directory that has been deleted; tell whether it was.

    The mathematics library that torch brings ends the process if torch is imported in one.
    """
    here = os.open(".", FOLDER)
    try:
        is_gone = os.fstat(here).st_nlink == 0
        if is_gone:
            os.chdir("/")
        yield is_gone
        if is_gone:
            os.fchdir(here)
    finally:
        os.close(here)


def _take_environment(environment: dict[bytes, bytes]) -> None:
    mine = dict(os.environb)
    for name in mine.keys() - environment.keys():
        del os.environb[name]
    for name, value in environment.items():
        if mine.get(name) != value:
            os.environb[name] = value
    if mine.get(TIME_ZONE) != environment.get(TIME_ZONE):
        time.tzset()
