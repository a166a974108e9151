"""Anonymous shared memory: no name, so nothing can leak, and every page is reserved up front."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE


def round_up(size: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least ``size``."""
    return -(-size // step) * step


def create(size: int, name: str = "keisei") -> tuple[int, mmap.mmap]:
    """Make ``size`` bytes of zeroed shared memory.

    Args:
        size: Bytes, rounded up to whole pages.
        name: Shown in ``/proc/<pid>/maps``; it is not a path.

    Returns:
        A descriptor to hand to the other process, which the caller closes, and the mapping. The
        memory lives as long as either of them, in any process.

    Raises:
        OSError: If the memory cannot be reserved; nothing is left open. Reserving now is what
            keeps a later write from ending the process by SIGBUS.
    """
    size = max(round_up(size, PAGE), PAGE)
    fd = anonymous_file(name)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
        return fd, _mapped(fd, size)
    except BaseException:
        os.close(fd)
        raise


def attach(fd: int) -> mmap.mmap:
    """Map memory received from another process; takes ``fd`` over and closes it."""
    try:
        return _mapped(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _mapped(fd: int, size: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, trackfd=False)
    return mmap.mmap(fd, size)  # keeps a copy of the descriptor as long as it lives


def part(
    whole: mmap.mmap, start: int, nbytes: int, on_unused: Callable[[], object]
) -> ctypes.Array[Any]:
    """Return a buffer on a part of ``whole``.

    Whatever is built on the buffer keeps it alive; when nothing does any more, ``on_unused`` is
    called, in whatever thread that happens.
    """
    buffer = _buffer_type(nbytes).from_buffer(whole, start)
    buffer.on_unused = on_unused
    part: ctypes.Array[Any] = buffer
    return part


@lru_cache(maxsize=64)
def _buffer_type(nbytes: int) -> Any:
    # Not weakref.finalize: this is every batch's path, and that would be half of it.
    return type("Part", (ctypes.c_ubyte * nbytes,), {"__del__": lambda self: self.on_unused()})


def anonymous_file(name: str) -> int:
    """Open an empty file without a name, of any size; the caller closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    fd, path = tempfile.mkstemp(prefix=f"{name}-")
    Path(path).unlink()
    return fd
