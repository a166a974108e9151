"""Windows: mappings of shared memory that keep no descriptor, for memory of which there is much.

Before Python 3.13 a ``mmap.mmap`` keeps a descriptor of its own as long as it lives. Weights have a
memory for each name, and a process may have hundreds of them.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import mmap
import os
from typing import Any

from keisei.ipc import forks, memory

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class Access(enum.Enum):
    """What may be done through a window."""

    WRITE = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    """Everything that is written is seen by all processes."""
    READ = (mmap.PROT_READ, mmap.MAP_SHARED)
    """Writing ends the process by SIGSEGV; such a window never leaves the package."""
    COPY = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _NO_RESERVE)
    """A page that is written becomes this process's own; the others are shared."""


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class Window:
    """A mapping that lives as long as anything that was built on its buffers.

    torch has no read-only tensors, and warns where a buffer says that it is read-only; so the
    buffers claim to be writable, whatever the access is.
    """

    __slots__ = ("_unmap", "address", "generation", "nbytes")

    def __init__(self, fd: int, nbytes: int, access: Access) -> None:
        """Map ``nbytes`` bytes behind ``fd``, which stays the caller's.

        Raises:
            OSError: It cannot be mapped so.
        """
        libc = _libc()
        address = libc.mmap(None, nbytes, *access.value, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address: int = address
        self.nbytes = nbytes
        self.generation = forks.generation
        self._unmap = functools.partial(libc.munmap, address, nbytes)

    def buffer(self) -> ctypes.Array[Any]:
        """Return a buffer on all of it, which keeps it."""
        buffer: ctypes.Array[Any] = self._kept(_type_of(ctypes.c_ubyte, self.nbytes))
        return buffer

    def words(self, count: int) -> ctypes.Array[ctypes.c_uint64]:
        """Return the first ``count`` 64-bit words, each of which is read and written at once."""
        words: ctypes.Array[ctypes.c_uint64] = self._kept(_type_of(ctypes.c_uint64, count))
        return words

    def _kept(self, kind: Any) -> Any:
        buffer = kind.from_address(self.address)
        buffer.window = self
        return buffer

    def __del__(self) -> None:
        unmap = getattr(self, "_unmap", None)
        if unmap is None:
            return  # it was not mapped
        if not memory.unmaps_aside(unmap, self.nbytes, self.generation):
            unmap()


def _type_of(element: Any, count: int) -> Any:
    # Not ``element * count`` itself: an instance of that has no room for what it keeps.
    return type("Buffer", (element * count,), {})


def create(size: int, name: str) -> tuple[int, Window]:
    """Make memory as ``memory.create(..., writable=False)``, and look at it through a window.

    Raises:
        OSError: There is no memory or no descriptor for it; nothing is left open.
    """
    mapped = functools.partial(Window, access=Access.WRITE)
    return memory.created(size, name, mapped, writable=False)


def attach(fd: int, size: int, access: Access) -> Window:
    """Map memory received from another process as ``memory.attach``; takes ``fd`` over.

    Raises:
        NotShared: It is not such memory.
        OSError: This process can map no more.
    """
    return memory.attached(fd, size, functools.partial(Window, access=access))
