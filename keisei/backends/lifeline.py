"""A pipe by which every process of the library's making learns that the application has gone."""

from __future__ import annotations

import atexit
import os
import threading


class _Lifeline:
    """A pipe whose write end this process alone holds: when it closes, every child is killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: tuple[int, int] | None = None

    def read_end(self) -> int:
        """Return the end that children are tied to."""
        with self._lock:
            if self._ends is None:
                self._ends = os.pipe()
            return self._ends[0]

    def cut(self) -> None:
        """Kill every child that is tied to this process, as its own death would."""
        self._lock = threading.Lock()  # in a forked process a thread that is gone may hold it
        ends, self._ends = self._ends, None
        if ends is not None:
            for fd in ends:
                os.close(fd)


lifeline = _Lifeline()
# At exit multiprocessing joins its children; they must be gone by then. A forked copy of the
# application must not keep its workers alive.
atexit.register(lifeline.cut)
os.register_at_fork(after_in_child=lifeline.cut)
