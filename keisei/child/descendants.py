"""The processes that workers leave behind: adopted by their parent's parent, and ended there.

A process group holds only those that stay in it. One in a session of its own, or one whose parent
has ended, is found all the same: the kernel gives the children of a process that ends to the
nearest ancestor that has asked for them (``PR_SET_CHILD_SUBREAPER``). A worker asks, so that what
its own children leave stays with it while it lives; the fork server asks, so that it gets, and
ends, what workers leave.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Container
from pathlib import Path

from keisei.ipc.ancestry import parent_of

_TRACKER = b"multiprocessing.resource_tracker"
TRACKER_PATIENCE = 2.0
"""Seconds that multiprocessing's resource tracker has to unlink what its process left named."""


def children() -> set[int]:
    """Return the pids of this process's children, also of those that wait to be reaped."""
    own = os.getpid()
    try:
        tasks = [(entry / "children").read_bytes() for entry in Path(f"/proc/{own}/task").iterdir()]
    except OSError:  # a kernel without these files
        return {pid for pid in _processes() if parent_of(pid) == own}
    return {int(pid) for task in tasks for pid in task.split()}


def _processes() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    except OSError:
        return []


class Orphans:
    """Ends the children of this process that it did not start; knows those it is waiting for."""

    def __init__(self) -> None:
        self._trackers: dict[int, float] = {}

    def end(self, spared: Container[int]) -> None:
        """Kill every child but those in ``spared``, once; call it again when any has ended.

        What a killed one leaves behind comes here too, so that after the last end none is left.
        A resource tracker ends by itself when its process has gone, and is given time for that.
        """
        now = time.monotonic()
        found = children()
        self._trackers = {pid: since for pid, since in self._trackers.items() if pid in found}
        for pid in found:
            if pid in spared:
                continue
            if _is_tracker(pid) and now - self._trackers.setdefault(pid, now) < TRACKER_PATIENCE:
                continue
            self._trackers.pop(pid, None)
            # A child that was not reaped keeps its number. Another user's cannot be ended.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def patience(self) -> float | None:
        """Return the seconds after which ``end`` is due again, ``None`` if nothing is awaited."""
        if not self._trackers:
            return None
        first = min(self._trackers.values())
        return max(0.0, first + TRACKER_PATIENCE - time.monotonic())


def _is_tracker(pid: int) -> bool:
    try:
        return _TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
