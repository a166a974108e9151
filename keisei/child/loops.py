"""The event loop that plain hooks find: none, so that they may run loops of their own.

A worker's hooks are called from tasks of an event loop. A ``def`` hook may nevertheless call
``asyncio.run``, or a blocking interface over a coroutine library. So the running loop, and on
Python 3.14 its current task, are taken out of the thread's state while such a hook runs.

Some of these libraries leave a loop of their own "running" between two calls, in a greenlet. It
is kept for the next plain hook, and is out of sight of the worker's loop.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from typing import Any

_running_loop = asyncio._get_running_loop  # noqa: SLF001 - documented for this purpose
_set_running_loop = asyncio._set_running_loop  # noqa: SLF001 - the same

if sys.version_info >= (3, 14):
    # There the current task belongs to the thread, before to the loop.
    _swap_task = asyncio.tasks._swap_current_task  # noqa: SLF001 - the only way
else:

    def _swap_task(loop: Any, task: Any) -> Any:
        """Leave each loop its own current task."""


class OutsideTheLoop:
    """A context without the running loop, for plain hooks; enter it in that loop only.

    Entering costs four calls of C functions: it is on every experience's path.
    """

    def __init__(self) -> None:
        self._ours: Any = None
        self._our_task: Any = None
        self._our_generators: Any = None
        self._theirs: Any = None
        self._their_task: Any = None
        self._their_generators: Any = None

    def __enter__(self) -> None:
        """Take the worker's loop out of sight, and bring back what hooks have left running."""
        ours = _running_loop()
        if ours is not self._ours:
            self._ours = ours
            self._our_generators = sys.get_asyncgen_hooks()
        if ours is not None:
            self._our_task = _swap_task(ours, None)
        theirs = self._theirs
        _set_running_loop(theirs)
        if theirs is not None:
            sys.set_asyncgen_hooks(*self._their_generators)
            _swap_task(theirs, self._their_task)

    def __exit__(self, *exc_info: object) -> None:
        """Bring the worker's loop back, and remember a loop that the hook has left running."""
        before, self._theirs = self._theirs, _running_loop()
        theirs, ours = self._theirs, self._ours
        if theirs is not None:
            self._their_task = _swap_task(theirs, None)
            self._their_generators = sys.get_asyncgen_hooks()
        _set_running_loop(ours)
        if ours is not None:
            _swap_task(ours, self._our_task)
        if theirs is not None or before is not None:
            sys.set_asyncgen_hooks(*self._our_generators)


def forget_current_loop() -> None:
    """Make ``asyncio.get_event_loop`` in plain hooks find what it finds in a new program.

    In a process of its own the worker's loop needs no place there.
    """
    state = _current_loop()
    if state is not None:
        state.clear()


def _policy() -> Any:
    events: Any = asyncio.events
    # From Python 3.14 on the public function gives a warning.
    get = getattr(events, "_get_event_loop_policy", None) or events.get_event_loop_policy
    return get()


def _current_loop() -> dict[str, Any] | None:
    """Return what the event loop policy knows of this thread; ``None`` if it keeps no such state.

    It has the same shape in asyncio's policies and in uvloop's; empty is that of a new thread.
    """
    local = getattr(_policy(), "_local", None)
    return None if local is None else vars(local)


class OutsideTheApplicationsLoop(OutsideTheLoop):
    """The same inside the application's process, which gets back all that loops leave changed.

    These are the thread's current event loop, the loop that a child watcher (before Python 3.14)
    is attached to, the handler of SIGINT and the descriptor that wakes a loop up for signals.
    """

    def __init__(self) -> None:
        super().__init__()
        self._their_current: dict[str, Any] = {}
        self._our_current: dict[str, Any] = {}
        self._our_watch: tuple[Any, Any] = (None, None)
        self._our_signals: tuple[Any, int] | None = None

    def __enter__(self) -> None:
        """Take the application's loop out of sight."""
        super().__enter__()
        self._our_watch = _child_watch()
        state = _current_loop()
        if state is not None:
            self._our_current = _exchanged(state, self._their_current)
        if threading.current_thread() is threading.main_thread():
            self._our_signals = signal.getsignal(signal.SIGINT), _wakeup_fd()

    def __exit__(self, *exc_info: object) -> None:
        """Bring it back."""
        state = _current_loop()
        if state is not None:
            self._their_current = _exchanged(state, self._our_current)
        watcher, loop = self._our_watch
        if watcher is not None and _child_watch() != (watcher, loop):
            watcher.attach_loop(loop)
        if self._our_signals is not None:
            handler, fd = self._our_signals
            signal.set_wakeup_fd(fd)
            if handler is not None and signal.getsignal(signal.SIGINT) is not handler:
                signal.signal(signal.SIGINT, handler)
        super().__exit__(*exc_info)


def _exchanged(state: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Put ``other`` in the place of what ``state`` holds, and return that."""
    before = dict(state)
    state.clear()
    state.update(other)
    return before


def _child_watch() -> tuple[Any, Any]:
    """Return the child watcher that is in use, if any, and the loop that it is attached to."""
    watcher = getattr(_policy(), "_watcher", None)
    return watcher, getattr(watcher, "_loop", None)


def _wakeup_fd() -> int:
    """Return the descriptor that signals are written to; they are held back meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return fd
