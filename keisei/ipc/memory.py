"""Anonymous shared memory: no name, every page reserved up front, and its size sealed.

A receiver of its descriptor can neither shrink nor grow the memory, so no process can end
another one by SIGBUS. Where the kernel refuses seals, memory is shared without them.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import stat
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from keisei.ipc import forks, kernel, room

M = TypeVar("M")

PAGE = mmap.PAGESIZE
_OUR_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that tell of this process's limits; any other error is about the descriptor."""
_LARGE = 1 << 26
"""Bytes from which on there must be room: to read how much costs little beside reserving it."""
_SLOW_TO_UNMAP = 1 << 23
"""Bytes from which on a mapping is unmapped in a thread."""


class NotShared(ValueError):
    """A descriptor is not the memory that its sender says it is."""


def round_up(size: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least ``size``."""
    return -(-size // step) * step


def create(size: int, name: str = "keisei", *, writable: bool = True) -> tuple[int, mmap.mmap]:
    """Make ``size`` bytes of zeroed shared memory.

    Args:
        size: Bytes, rounded up to whole pages.
        name: Shown in ``/proc/<pid>/maps``; it is not a path.
        writable: Whether other processes may write there; the mapping returned is writable.

    Returns:
        A descriptor to hand to the other process, which the caller closes, and the mapping. The
        memory lives as long as either of them, in any process.

    Raises:
        OSError: If the memory cannot be reserved; nothing is left open. Reserving now is what
            keeps a later write from ending the process by SIGBUS.
    """
    return created(size, name, _mapped, writable=writable)


def created(
    size: int, name: str, mapped: Callable[[int, int], M], *, writable: bool
) -> tuple[int, M]:
    """Do as ``create`` with a mapping of another kind, which ``mapped`` makes."""
    size = max(round_up(size, PAGE), PAGE)
    fd = kernel.open_nameless(name)
    try:
        if size >= _LARGE:
            _look_for_room(size)
        if kernel.can_reserve():
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
        whole = mapped(fd, size)
        if kernel.can_seal():
            protect = not writable and kernel.can_seal_writes()
            seals = kernel.SIZE_SEALS | (kernel.WRITE_SEAL if protect else 0)
            fcntl.fcntl(fd, kernel.F_ADD_SEALS, seals)
        return fd, whole
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _with_size(error, size) from error
        raise


def _look_for_room(size: int) -> None:
    """Refuse what would have the kernel end other processes for want of memory."""
    free = room.available()
    if free is not None and size > free:
        raise OSError(errno.ENOMEM, f"{os.strerror(errno.ENOMEM)}: {free:,} bytes are available")


def _with_size(error: OSError, size: int) -> OSError:
    return OSError(error.errno, f"{error.strerror} ({size:,} bytes of shared memory)")


def attach(fd: int, size: int | None = None, *, writable: bool = True) -> mmap.mmap:
    """Map memory received from another process; takes ``fd`` over and closes it.

    Args:
        fd: The descriptor, which may be anything.
        size: What it must have, in bytes, rounded up to whole pages; ``None`` takes any.
        writable: Whether the mapping is; what was made with ``writable=False`` cannot be.

    Raises:
        NotShared: It is not memory from ``create``, its size could still be changed, or is not
            ``size``, or it was opened in a way that refuses such a mapping. Nothing was mapped.
        OSError: This process can map no more: it has no descriptors or addresses left.
    """
    return attached(fd, size, functools.partial(_mapped, writable=writable))


def attached(fd: int, size: int | None, mapped: Callable[[int, int], M]) -> M:
    """Do as ``attach`` with a mapping of another kind, which ``mapped`` makes."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size <= 0:
            raise NotShared("the descriptor is not shared memory")
        if size is not None and status.st_size != max(round_up(size, PAGE), PAGE):
            raise NotShared(f"shared memory of {status.st_size} bytes is said to have {size}")
        if kernel.can_seal():
            seals = kernel.seals(fd)
            if seals is None or seals & kernel.SIZE_SEALS != kernel.SIZE_SEALS:
                raise NotShared("the size of shared memory is not sealed")
        return mapped(fd, status.st_size)
    except OSError as error:
        if error.errno in _OUR_LIMITS:
            raise
        raise NotShared(f"shared memory cannot be mapped: {error.strerror}") from error
    except OverflowError as error:
        raise NotShared("shared memory is larger than any address") from error
    finally:
        os.close(fd)


def _mapped(fd: int, size: int, *, writable: bool = True) -> mmap.mmap:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, access=access, trackfd=False)
    return mmap.mmap(fd, size, access=access)  # keeps a copy of the descriptor as long as it lives


class Region:
    """A mapping that is kept by all that lies on it.

    The last of them to go has it unmapped: a large one in a thread of its own, because that takes
    tens of milliseconds, in which an event loop would stand still.
    """

    __slots__ = ("address", "generation", "map")

    def __init__(self, whole: mmap.mmap) -> None:
        """Take ``whole`` over; it must be writable."""
        self.map = whole
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(whole))
        self.generation = forks.generation

    def __del__(self) -> None:
        unmaps_aside(self.map.close, len(self.map), self.generation)


def unmaps_aside(unmap: Callable[[], object], nbytes: int, generation: int) -> bool:
    """Have a large mapping unmapped in a thread; return whether that has begun.

    Args:
        unmap: What unmaps it.
        nbytes: Its size.
        generation: The ``forks.generation`` in which it was mapped; a copy of it in a forked child
            is not unmapped aside.
    """
    if nbytes >= _SLOW_TO_UNMAP and generation == forks.generation:
        # Not threading.Thread, which takes locks: this may be the garbage collector's call.
        with contextlib.suppress(RuntimeError):  # no room for a thread
            _thread.start_new_thread(unmap, ())
            return True
    return False


def part(
    region: Region, start: int, nbytes: int, on_unused: Callable[[], object]
) -> ctypes.Array[Any]:
    """Return a buffer on a part of ``region``.

    Every view of the buffer keeps it alive. When the last one goes, ``on_unused`` is called, in
    the thread where that happens. A forked child that lets go of its copy calls nothing: the part
    is its parent's.
    """
    if not 0 <= start <= start + nbytes <= len(region.map):
        raise ValueError(f"bytes {start} to {start + nbytes} are not in {len(region.map)}")
    buffer = _buffer_type(nbytes).from_address(region.address + start)
    buffer.region = region
    buffer.on_unused = on_unused
    buffer.generation = forks.generation
    part: ctypes.Array[Any] = buffer
    return part


def _on_unused(buffer: Any) -> None:
    if buffer.generation == forks.generation:
        buffer.on_unused()


@lru_cache(maxsize=64)
def _buffer_type(nbytes: int) -> Any:
    # Not weakref.finalize: this is every batch's path, and that would be half of it.
    return type("Part", (ctypes.c_ubyte * nbytes,), {"__del__": _on_unused})


def anonymous_file(name: str) -> int:
    """Open an empty file without a name, of any size; the caller closes it."""
    return kernel.open_nameless(name)
