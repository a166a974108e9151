"""Descriptors that become readable when a process ends, also where the kernel has no pidfds."""

from __future__ import annotations

import os
import select
import threading

from keisei.ipc.kernel import has_pidfd
from keisei.testing.leaks import has_ended

_LOOK = 10
"""Milliseconds between two looks at a process, where there is no pidfd."""


def end_of(pid: int) -> int:
    """Return what becomes readable when ``pid``, any process of this machine, ends.

    The caller closes it.
    """
    if has_pidfd():
        return os.pidfd_open(pid)
    told, tell = os.pipe()

    def watch() -> None:
        poll = select.poll()
        poll.register(tell, 0)  # an error, once the reading end is closed
        while not has_ended(pid) and not poll.poll(_LOOK):
            pass
        os.close(tell)

    threading.Thread(target=watch, name="end of a process", daemon=True).start()
    return told
