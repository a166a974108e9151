"""Wait for one direction of a descriptor, in the running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watch:
    """One direction of one descriptor, the tasks that wait for it, and perhaps a listener.

    The descriptor is watched from the first wait on and left watched between waits; an event
    that finds no waiting task and no work left ends the watch. So a busy queue makes no
    ``epoll_ctl`` calls. While it rests, events wake no task up. It belongs to one event loop at a
    time; when that loop is gone, to the next that uses it.
    """

    def __init__(self, fd: int, *, writing: bool, work: Callable[[], bool]) -> None:
        """Prepare to watch ``fd``.

        Args:
            fd: Stays the owner's, who calls ``stop`` before closing it.
            writing: Watch for room to write, not for something to read.
            work: Does what an event makes due, and tells whether more of it is left to do.
        """
        self._fd = fd
        self._writing = writing
        self._work = work
        self._heard: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_watching = False
        self._rest: asyncio.TimerHandle | None = None
        # A dict for its order: who waits longest looks first.
        self._futures: dict[asyncio.Future[bool], None] = {}

    async def wait(self, deadline: float | None) -> bool:
        """Return whether something happened before ``deadline`` (loop time)."""
        self.begin()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._futures[future] = None
        timer = None if deadline is None else loop.call_at(deadline, _settle, future, False)
        try:
            return await future
        finally:
            self._futures.pop(future, None)
            if timer is not None:
                timer.cancel()

    def listen(self, heard: Callable[[], None]) -> None:
        """Call ``heard`` in the running loop after every event, until ``stop``."""
        self.begin()
        self._heard = heard

    def begin(self) -> None:
        """Watch in the running loop; where none runs, the next call does the work that is due."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._loop is not loop:
            self.stop()
            self._heard = None  # it belongs to the loop before
            self._loop = loop
            self._watch(loop)

    def rest(self, until: float) -> None:
        """Notice nothing until then (loop time), and then all that has happened."""
        if self._loop is not None and self._rest is None:
            self._watch_no_longer(self._loop)
            self._rest = self._loop.call_at(until, self._end_rest)

    def _end_rest(self) -> None:
        self._rest = None
        self._ready()
        if self._loop is not None and self._rest is None:
            self._watch(self._loop)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_watching = True
        (loop.add_writer if self._writing else loop.add_reader)(self._fd, self._ready)

    def _watch_no_longer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._is_watching:
            self._is_watching = False
            (loop.remove_writer if self._writing else loop.remove_reader)(self._fd)

    def _ready(self) -> None:
        unfinished = self._work()
        heard = self._heard
        if not unfinished and not self._futures and heard is None:
            self.stop()
        self._notify()
        if heard is not None:
            heard()

    def _notify(self) -> None:
        """Let every waiter look again."""
        for future in self._futures:
            _settle(future, True)

    def stop(self) -> None:
        """Watch no longer, and let every waiter look again; ``work`` may call it too."""
        loop, self._loop = self._loop, None
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if loop is not None and loop.is_closed():
            self._futures.clear()  # of tasks that nothing will ever resume
        elif loop is not None:
            self._watch_no_longer(loop)
        self._notify()

    def close(self) -> None:
        """Watch never again, and let go of the owner and of the listener."""
        self.stop()
        self._heard = None
        self._work = _nothing_is_left

    def disown(self) -> None:
        """Do as ``close``, without a call to the loop: in a forked child its epoll set is shared.

        To remove the descriptor there would make the parent deaf.
        """
        self._loop = self._rest = None
        self._futures.clear()
        self.close()


def _nothing_is_left() -> bool:
    return False


def deadline_after(timeout: float | None) -> float | None:
    """Return the loop time at which ``timeout`` seconds from now are over."""
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


def _settle(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
