"""Which system calls this kernel, or the sandbox around it, allows: each is tried once.

That a function exists says nothing: gVisor, seccomp filters and old kernels refuse calls that the
C library has. Each answer is kept for the life of the process.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

REFUSALS = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
)
"""The errors by which a call is refused for good. Any other, such as EMFILE, says nothing."""

_known: dict[str, bool] = {}


def has_pidfd() -> bool:
    """Return whether processes can be watched, and signalled, through a pidfd."""
    return hasattr(os, "pidfd_open") and _works("pidfd_open", _use_a_pidfd)


def _use_a_pidfd() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        # Refused by some filters that let it be opened; a signal would be lost in silence.
        signal.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)


def forget() -> None:
    """Try every call anew; for tests, which have calls refused."""
    _known.clear()


def _works(name: str, call: Callable[[], object]) -> bool:
    known = _known.get(name)
    if known is None:
        try:
            call()
        except OSError as error:
            if error.errno not in REFUSALS:
                return True  # not refused for good: the call that needs it tells what is wrong
            known = False
        else:
            known = True
        _known[name] = known
    return known
