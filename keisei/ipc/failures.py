"""What a process tells of an exception: text of bounded length."""

from __future__ import annotations

import errno
import resource
import traceback

LONGEST = 1 << 15
"""Characters of one text. Everything that is told of a failure is small enough to be heard at once,
so that a worker's last words are known when its end is."""


def summary(error: BaseException) -> str:
    """Return the class and the message of ``error``, also of one whose ``__str__`` raises."""
    return shortened("".join(traceback.format_exception_only(error)).strip())


def trace(error: BaseException) -> str:
    """Return the traceback of ``error`` with those of its causes."""
    return shortened("".join(traceback.format_exception(error)))


def shortened(text: str) -> str:
    """Leave out the middle of a text that is longer than ``LONGEST``; both ends say more."""
    left_out = len(text) - LONGEST
    if left_out <= 0:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n… ({left_out:,} characters left out) …\n{text[-half:]}"


DESCRIPTORS = 12
"""Descriptors that one worker takes in the application's process; a few more while it starts."""


def remedy(error: BaseException) -> str:
    """Return what helps where the system has run out of something; "" for any other error."""
    match error.errno if isinstance(error, OSError) else None:
        case errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return (
                f"each worker takes about {DESCRIPTORS} file descriptors of the application, which "
                f"may have {limit:,}; raise that limit ('ulimit -n 65536') or take fewer workers"
            )
        case errno.ENFILE:
            return (
                f"the whole system has no file left (sysctl fs.file-max), and each worker takes "
                f"about {DESCRIPTORS}; take fewer workers"
            )
        case errno.EAGAIN:
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            allowed = "any number of" if limit == resource.RLIM_INFINITY else f"{limit:,}"
            return (
                f"there is no room for another process or thread; this user may have {allowed} "
                "('ulimit -u'), and a container its own limit (pids.max)"
            )
        case errno.ENOMEM | errno.ENOSPC:
            return (
                "there is no memory left, or no room for temporary files; take fewer workers or "
                "smaller experiences, or raise the memory limit of the container"
            )
    return ""
