"""Descriptors that become readable when a process ends, also where the kernel has no pidfds."""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

from keisei.ipc.kernel import has_pidfd

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
        while _lives(pid) and not poll.poll(_LOOK):
            pass
        os.close(tell)

    threading.Thread(target=watch, name="end of a process", daemon=True).start()
    return told


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
