"""One system's process tree: started in a session of its own, bounded in time, and ended whole."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import procfs

GRACE = 3.0
"""Seconds for a tree to end by itself after a request, or after its root is gone."""

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that all of them can be found and ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_session(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path, timeout: float
) -> int | None:
    """Run ``argv`` as the leader of a new session and wait for it.

    When this returns or is interrupted, this process has no descendants any more. Signals go to
    its own descendants only, through pidfds, never by name or number.

    Args:
        argv: The command.
        env: The whole environment.
        log: Receives standard output and error.
        timeout: Seconds until the tree is ended.

    Returns:
        The leader's exit code, or ``None`` if the time was over.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ending = os.pidfd_open(process.pid)
    ended = False
    try:
        ended = _wait(ending, timeout)
    finally:
        try:
            if not ended:
                signal.pidfd_send_signal(ending, signal.SIGTERM)
            _end_descendants()
        finally:
            os.close(ending)
            process.wait()
            _reap_orphans()
    return process.returncode if ended else None


def _wait(pidfd: int, timeout: float) -> bool:
    return bool(select.select([pidfd], [], [], max(0.0, timeout))[0])


def _end_descendants() -> None:
    """Wait a moment for the rest of the tree, then kill it, until nothing is left."""
    deadline = time.monotonic() + GRACE
    while left := procfs.descendants():
        for pid in left:
            _end(pid, deadline)


def _end(pid: int, deadline: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if not _wait(pidfd, deadline - time.monotonic()) and pid in procfs.descendants():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _wait(pidfd, GRACE)
        finally:
            os.close(pidfd)


def _reap_orphans() -> None:
    """Reap the adopted processes that ended; this process has no other children at that point."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
