"""Which system calls this kernel, or the sandbox around it, allows: each is tried once.

That a function exists says nothing: gVisor, seccomp filters and old kernels refuse calls that the
C library has. Each answer is kept for the life of the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from keisei.ipc import ancestry

REFUSALS = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
)
"""The errors by which a call is refused for good. Any other, such as EMFILE, says nothing."""

F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
F_GET_SEALS = getattr(fcntl, "F_GET_SEALS", 1034)
SIZE_SEALS = 0x1 | 0x2 | 0x4
"""F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW: the size is final, and so are the seals."""
WRITE_SEAL = 0x10
"""F_SEAL_FUTURE_WRITE: mappings that exist stay writable, new ones are read-only."""

_known: dict[str, bool] = {}


def has_memfd() -> bool:
    """Return whether ``memfd_create`` works; else an unlinked temporary file takes its place."""
    return _works("memfd_create", lambda: os.close(os.memfd_create("keisei-probe", 0)))


def can_seal() -> bool:
    """Return whether the size of shared memory can be sealed; else it is shared unsealed."""
    return has_memfd() and _works("seals", lambda: _seal(SIZE_SEALS))


def can_seal_writes() -> bool:
    """Return whether later mappings can be made read-only by a seal; Linux 5.1 brought it."""
    return can_seal() and _works("write_seal", lambda: _seal(SIZE_SEALS | WRITE_SEAL))


def can_reserve() -> bool:
    """Return whether ``posix_fallocate`` works; else memory is sized without being reserved."""
    return hasattr(os, "posix_fallocate") and _works("posix_fallocate", _reserve)


def has_pidfd() -> bool:
    """Return whether processes can be watched, and signalled, through a pidfd."""
    return hasattr(os, "pidfd_open") and _works("pidfd_open", _use_a_pidfd)


def capabilities() -> dict[str, bool]:
    """Return what was found, by the name of the call, for a report."""
    return {
        "memfd_create": has_memfd(),
        "seals": can_seal(),
        "write_seal": can_seal_writes(),
        "posix_fallocate": can_reserve(),
        "pidfd_open": has_pidfd(),
    }


def forget() -> None:
    """Try every call anew; for tests, which have calls refused."""
    _known.clear()


def open_nameless(name: str) -> int:
    """Open an empty file without a name, which allows seals where there are any."""
    if has_memfd():
        flags = os.MFD_CLOEXEC | getattr(os, "MFD_ALLOW_SEALING", 0x2)
        return os.memfd_create(name, flags)
    fd, path = tempfile.mkstemp(prefix=ancestry.prefix(name))
    Path(path).unlink()
    return fd


def seals(fd: int) -> int | None:
    """Return the seals of a file, ``None`` if it is of a kind that has none."""
    try:
        return fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        return None


def _works(name: str, call: Callable[[], object]) -> bool:
    known = _known.get(name)
    if known is None:
        try:
            call()
        except AttributeError:  # this Python, or its C library, has no such function
            known = False
        except OSError as error:
            if error.errno not in REFUSALS:
                return True  # not refused for good: the call that needs it tells what is wrong
            known = False
        else:
            known = True
        _known[name] = known
    return known


def _use_a_pidfd() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        # Some filters let it be opened and refuse this; a signal would be lost in silence.
        signal.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)


def _seal(wanted: int) -> None:
    fd = open_nameless("keisei-probe")
    try:
        os.ftruncate(fd, 1)
        fcntl.fcntl(fd, F_ADD_SEALS, wanted)
        if fcntl.fcntl(fd, F_GET_SEALS) & wanted != wanted:
            raise OSError(errno.EOPNOTSUPP, "seals are accepted and not kept")
    finally:
        os.close(fd)


def _reserve() -> None:
    fd = open_nameless("keisei-probe")
    try:
        os.posix_fallocate(fd, 0, 1)
    finally:
        os.close(fd)
