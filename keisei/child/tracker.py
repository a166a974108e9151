"""multiprocessing's resource tracker in a worker: it outlives the worker, to clean up after it.

The tracker is a process that multiprocessing starts when named shared memory or a semaphore is
made for the first time. When all who might use these have ended, it unlinks what they left. A
worker is killed together with its process group, so the tracker must not be in that group.

A worker that uses none of this starts nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from multiprocessing import resource_tracker, util
from typing import Any


class _StartsSessions:
    """Stands in for ``multiprocessing.util`` in the module of the tracker, and nowhere else."""

    def __getattr__(self, name: str) -> Any:
        return getattr(util, name)

    @staticmethod
    def spawnv_passfds(path: Any, args: Any, passfds: Any) -> int:
        """Start the tracker in a session of its own; in Python 3.11 to 3.14 by this function."""
        process = subprocess.Popen(  # noqa: S603 - what multiprocessing itself would start
            args, executable=path, pass_fds=passfds, start_new_session=True, restore_signals=False
        )
        process.returncode = 0  # the tracker's own object waits for it
        return process.pid


def keep_apart() -> None:
    """Have this process, and those forked from it, start their tracker outside their group.

    A tracker that was inherited is forgotten: it cleans up after another process.
    """
    state = _state()
    if state["_fd"] is not None:
        with contextlib.suppress(OSError):
            os.close(state["_fd"])
        state["_fd"] = state["_pid"] = None
    resource_tracker.util = _StartsSessions()  # type: ignore[attr-defined]


def clean_up(patience: float) -> None:
    """Let the tracker, if there is one, unlink the rest, and wait for that.

    It begins once no child of this process uses it any more; the wait is bounded.

    Args:
        patience: Seconds.
    """
    state = _state()
    fd, pid = state["_fd"], state["_pid"]
    if fd is None or pid is None:
        return
    state["_fd"] = state["_pid"] = None
    with contextlib.suppress(OSError, AttributeError):  # an old kernel: it is not waited for
        pidfd = os.pidfd_open(pid)
        try:
            os.close(fd)
            select.select([pidfd], [], [], patience)
        finally:
            os.close(pidfd)


def _state() -> dict[str, Any]:
    """Return the attributes of the tracker's object: its pipe and its pid, ``None`` at first."""
    return vars(resource_tracker._resource_tracker)  # noqa: SLF001 - no public name has them
