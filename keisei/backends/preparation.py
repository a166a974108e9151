"""What a process reads first: how to prepare itself, and what to run."""

from __future__ import annotations

import io
import multiprocessing
import sys
from multiprocessing import context, reduction
from multiprocessing import process as mp_process
from pathlib import Path
from typing import Any

from keisei.backends import mainscript


def pickled(process: Any, popen: Any, with_main: bool) -> bytes:
    """Return what ``multiprocessing.spawn`` reads in a new process, as two pickles.

    Args:
        process: A ``BaseProcess`` that is being started.
        popen: What starts it.
        with_main: Import the application's main script in the new process.
    """
    buffer = io.BytesIO()
    context.set_spawning_popen(popen)
    try:
        reduction.dump(preparation(process.name, with_main), buffer)
        reduction.dump(process, buffer)
    finally:
        context.set_spawning_popen(None)
    return buffer.getvalue()


def preparation(name: str, with_main: bool) -> dict[str, Any]:
    """Return what multiprocessing prepares a new process with.

    Its own ``get_preparation_data`` settles the application's default start method for good.
    """
    found = {
        "name": name,
        "authkey": mp_process.current_process().authkey,
        "sys_argv": sys.argv,
        "orig_dir": mainscript.original_dir(),
    }
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        found["start_method"] = method
    if with_main:
        found.update(mainscript.description())
    return found


def import_path() -> list[str]:
    """Return the application's ``sys.path`` for another process.

    Python passes over entries that are no strings, ``Path`` objects too, and so does this. What
    is relative, "" too, refers to where the application was started or to where it is now.
    """
    start = mainscript.original_dir()
    is_at_start = _is_at(start)
    found: list[str] = []
    for entry in sys.path:
        if isinstance(entry, str):
            plain = str.__str__(entry)  # a subclass may have a text of its own
            is_relative = not Path(plain).is_absolute()
            if is_relative and start:
                found.append(str(Path(start, plain)))
            if not (is_relative and is_at_start):
                found.append(plain)
    return found


def _is_at(folder: str) -> bool:
    try:
        return str(Path.cwd()) == folder
    except OSError:
        return False  # the working directory is gone
