"""What a process of ours does to itself and its children: group, signals, lifeline, reaping.

Imports nothing heavy.

Before anything else a process ties its life to the application's: it leads a process group of
its own and asks the kernel to kill that group when the application's end of the lifeline pipe
is closed, which the kernel does whatever the process is doing at that moment.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import select
import signal
import sys

STDERR = 2
_F_SETSIG = 10
_PR_SET_CHILD_SUBREAPER = 36

STACKS_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
"""Makes a worker write the stack of its main thread; chosen far from what applications use."""
ALL_STACKS_SIGNAL = signal.SIGRTMAX - 4 if hasattr(signal, "SIGRTMAX") else STACKS_SIGNAL
"""Makes a worker write the stacks of all its threads, which may crash it.

The handler reads the frames of threads that run meanwhile. The kernel prefers the main thread for
a signal, and a thread's own frames stand still while it handles one.
"""
HELD_SIGNALS = {signal.SIGINT, STACKS_SIGNAL, ALL_STACKS_SIGNAL}
"""Blocked from before a process exists until it can take them."""


def lead_own_group() -> None:
    """Leave the application's process group, so that its terminal's Ctrl-C stays there.

    To a terminal the new group is in the background: writing to it, configuring it or reading
    from it would stop the process without a word. So both signals are ignored, by its children
    too: writes and settings work, and a read fails with EIO.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def heed_signals(crash_fd: int) -> None:
    """Write stacks into ``crash_fd`` on a crash or on request, and end on SIGTERM.

    Otherwise it would inherit how the application itself handles SIGTERM.
    """
    faulthandler.enable(file=crash_fd, all_threads=True)
    faulthandler.register(ALL_STACKS_SIGNAL, file=crash_fd, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, file=crash_fd, all_threads=False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL, ALL_STACKS_SIGNAL, signal.SIGTERM})


def adopt_orphans() -> bool:
    """Become the parent of all descendants whose parents end; return whether the kernel allows it.

    It can find them then, also in a session or process group of their own.
    """
    # Elsewhere than on Linux there is no prctl, and a sandbox may refuse it: orphans go to init.
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        arguments = [ctypes.c_ulong(1), *[ctypes.c_ulong(0)] * 3]
        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, *arguments) == 0)
    return False


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


def is_cut(lifeline: int, patience: float = 0.0) -> bool:
    """Return whether the application has gone, or goes within ``patience`` seconds."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    return bool(poll.poll(1000 * patience))


def _watch_in_a_thread(lifeline: int) -> None:
    """Kill the group from a thread, where the kernel cannot be asked to."""
    import threading

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="keisei-lifeline", daemon=True).start()


def reap(pid: int | None, flag: int = os.WNOHANG) -> tuple[int, int]:
    """Reap one child, or any that has ended; first end the rest of its process group.

    Only until it is reaped can the number of its group be nobody else's.

    Returns:
        What ``os.waitpid`` does.

    Raises:
        ChildProcessError: There is no such child.
    """
    if hasattr(os, "waitid"):
        kind, number = (os.P_ALL, 0) if pid is None else (os.P_PID, pid)
        ended = os.waitid(kind, number, os.WEXITED | os.WNOWAIT | flag)
        if ended is None:
            return 0, 0
        pid = ended.si_pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    return os.waitpid(-1 if pid is None else pid, flag)


class Inherited:
    """Descriptors that this process was started with, for the code that it runs."""

    fds: tuple[int, ...] = ()
    lifeline: int = -1


def flush() -> None:
    """Write out the buffers of the standard streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, replaced or missing: not ours to mend
            stream.flush()
