"""BackgroundObserver: hands events to a thread of its own, which writes them somewhere.

The pool's event loop never waits for a disk or a network. What cannot be written is told once, and
the training goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from keisei.events import Event, PoolStopped

__all__ = ["BackgroundObserver"]

logger = logging.getLogger("keisei.observers")

_AT_EXIT = 5.0
"""Seconds that the interpreter's end waits for what is not written yet."""
_AT_STOP = 0.05
"""Seconds that the loop waits at ``PoolStopped``, so that a run's files are complete after it."""


class BackgroundObserver(ABC):
    """Base of observers that write to a disk or a network.

    Subclasses say which events they want and write them: ``open``, ``write`` and ``close`` are
    called in the thread, one at a time. The thread begins with the first event that is wanted and
    ends at ``PoolStopped``; another run begins another one. Used as a context manager, it also
    ends with the block.

    An error of ``write`` costs that event and is told once, as a warning of the logger
    "keisei.observers"; the next event is tried again, and the first that is written after errors
    is told too.

    Args:
        max_pending: Events that may wait for a slow disk or network; beyond them the oldest are
            dropped, counted in ``num_dropped`` and told once.

    Attributes:
        num_dropped: Events that were dropped because too many waited.
        num_failed: Events that could not be written.
    """

    wanted: tuple[type[Event], ...] = (Event,)

    def __init__(self, *, max_pending: int = 10_000) -> None:
        self.num_dropped = 0
        self.num_failed = 0
        self._max_pending = max_pending
        self._pending: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: threading.Thread | None = None
        self._is_open = False
        self._is_failing = False
        self._told = False
        _ours.add(self)

    @abstractmethod
    def open(self) -> None:
        """Get ready to write; called again before the next event if it raised."""

    @abstractmethod
    def write(self, event: Event) -> None:
        """Write one event, all of it or nothing."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is left, and let go of everything; ``open`` may follow."""

    @property
    @abstractmethod
    def target(self) -> str:
        """Where it writes, for messages."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish()

    def on_event(self, event: Event) -> None:
        """Hand ``event`` to the thread; returns at once."""
        if isinstance(event, self.wanted):
            self._put(event)
        if isinstance(event, PoolStopped):
            self.finish(_AT_STOP)

    def finish(self, timeout: float | None = _AT_EXIT) -> bool:
        """Write what is pending, close, and end the thread; return whether all that is done.

        Blocks. May be called again; a later event begins a new thread.

        Args:
            timeout: Seconds to wait; what is not done then goes on in the thread.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._pending.put(None)
            self._pending = queue.SimpleQueue()
            self._last = thread
        last = self._last
        if last is None or last is threading.current_thread():
            return True
        last.join(timeout)
        return not last.is_alive()

    def _put(self, event: Event) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work,
                args=(self._pending, self._last),
                name=f"keisei-{type(self).__name__}",
                daemon=True,
            )
            self._thread.start()
        if self._pending.qsize() >= self._max_pending:
            with contextlib.suppress(queue.Empty):
                self._pending.get_nowait()
            self.num_dropped += 1
            if self.num_dropped == 1:
                logger.warning(
                    "%s is too slow: more than %d events wait, and the oldest are dropped; "
                    "told once",
                    self.target,
                    self._max_pending,
                )
        self._pending.put(event)

    def _work(
        self, pending: queue.SimpleQueue[Event | None], before: threading.Thread | None
    ) -> None:
        if before is not None:
            before.join()  # the run before is still being written
        while (event := pending.get()) is not None:
            self._write(event)
            del event
        if self._is_open:
            self._is_open = False
            try:
                self.close()
            except Exception as error:  # noqa: BLE001 - a disk, a network or a library: told
                self._tell(error)

    def _write(self, event: Event) -> None:
        try:
            if not self._is_open:
                self.open()
                self._is_open = True
            self.write(event)
        except Exception as error:  # noqa: BLE001 - a disk, a network or a library: told
            self.num_failed += 1
            self._is_failing = True
            self._tell(error)
            return
        if self._is_failing:
            self._is_failing = False
            logger.info("%s is written again; %d events are lost", self.target, self.num_failed)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            what = f"{type(error).__name__}: {error}".strip()
            text = "%s cannot be written: %s; the training goes on, and this is told once"
            logger.warning(text, self.target, what)

    def _forget(self) -> None:
        """Forget the thread in a forked child, which does not have it."""
        self._thread = None
        self._last = None
        self._pending = queue.SimpleQueue()
        self._is_open = False


_ours: weakref.WeakSet[BackgroundObserver] = weakref.WeakSet()


def _finish_all() -> None:
    for observer in list(_ours):
        observer.finish(_AT_EXIT)


def _forget_all() -> None:
    for observer in list(_ours):
        observer._forget()  # noqa: SLF001 - the same module


atexit.register(_finish_all)
os.register_at_fork(after_in_child=_forget_all)
