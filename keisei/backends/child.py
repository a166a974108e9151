"""The first and last thing that runs in a new process; imports nothing heavy.

Before anything else a process ties its life to the application's: it leads a process group of
its own and asks the kernel to kill that group when the application's end of the lifeline pipe
is closed, which the kernel does whatever the process is doing at that moment.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys

_F_SETSIG = 10


def lead_own_group() -> None:
    """Leave the application's process group, so that its terminal's Ctrl-C stays there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def tie_to(lifeline: int) -> int:
    """Have the kernel kill this process group when the other end of ``lifeline`` is closed.

    The signal belongs to an open file description, so the pipe is opened anew. Nothing is ever
    written to it.

    Returns:
        The descriptor that must stay open as long as the process lives.
    """
    try:
        own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        own = os.dup(lifeline)
        _watch_in_a_thread(own)
    if is_cut(own):
        os._exit(1)
    return own


def is_cut(lifeline: int) -> bool:
    """Return whether the application has gone."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    return bool(poll.poll(0))


def _watch_in_a_thread(lifeline: int) -> None:
    """Kill the group from a thread, where the kernel cannot be asked to."""
    import threading

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="keisei-lifeline", daemon=True).start()


class Inherited:
    """Descriptors that this process was started with, for the code that it runs."""

    fds: tuple[int, ...] = ()


def run(data: int, fds: list[int], lifeline: int) -> int:
    """Become the process that ``data``, a pipe, describes; return its exit code.

    Args:
        data: multiprocessing's preparation data and process object, pickled.
        fds: Descriptors for the process object's code.
        lifeline: The read end of the application's lifeline pipe.
    """
    from multiprocessing import spawn

    lead_own_group()
    tie_to(lifeline)
    for fd in (lifeline, *fds):
        os.set_inheritable(fd, False)
    Inherited.fds = tuple(fds)
    code: int = spawn._main(data, os.dup(data))  # type: ignore[attr-defined]
    return code


def main(data: int, lifeline: int, fds: list[int], path: list[str]) -> None:
    """Run a process in a fresh interpreter: the entry of the start method "spawn"."""
    sys.path[:] = path
    sys.exit(run(data, fds, lifeline))
