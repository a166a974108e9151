"""What workers write to standard error: passed on to the application's, and its end remembered.

Each process has a pipe for it, so that an incident can tell a process's last lines. A thread
passes everything on: neither does an event loop that is busy hold a worker up, nor a terminal
that is blocked the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections import deque

from keisei.child.process import STDERR

TAIL = 4096
"""Bytes that are remembered of each process."""
_CHUNK = 1 << 16
_MOST = 1 << 20
"""Bytes read in a row of a process that never stops writing."""


class StderrTail:
    """The end of what one process wrote."""

    def __init__(self, relay: StderrRelay, fd: int) -> None:
        self.fd = fd
        self.text = b""
        self.has_ended = False
        self._relay = relay

    def read(self) -> str:
        """Return the last lines, up to 4096 bytes of what was written up to now."""
        self._relay.drain(self)
        text = self.text[-TAIL:]
        if len(self.text) > TAIL:
            text = text.partition(b"\n")[2] or text
        return text.decode(errors="replace")

    def close(self) -> None:
        """Pass the rest on, and close the pipe."""
        self._relay.remove(self)


class StderrRelay:
    """A thread, and the pipes that it reads; it runs as long as there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # never held while the application's end may block
        self._tails: dict[int, StderrTail] = {}
        self._unwritten: deque[bytes] = deque()
        self._thread: threading.Thread | None = None  # the last one, which may have ended
        self._is_reading = False
        self._alarm: tuple[int, int] = (-1, -1)

    def pipe(self) -> tuple[StderrTail, int]:
        """Make a pipe that is read from now on; return its reader, and the end to write to.

        Raises:
            OSError: There is no room for a thread or descriptors; nothing is left open.
        """
        fd, write_end = os.pipe()
        tail = StderrTail(self, fd)
        with self._lock:
            try:
                os.set_blocking(fd, False)
                if not self._is_reading:
                    self._begin()
            except BaseException:
                os.close(fd)
                os.close(write_end)
                raise
            self._tails[fd] = tail
            self._rouse()
        return tail, write_end

    def drain(self, tail: StderrTail) -> None:
        """Read all that a pipe holds now."""
        with self._lock:
            self._read(tail)
            self._rouse()

    def remove(self, tail: StderrTail) -> None:
        """Read all that a pipe holds now, and close it; a second call has no effect."""
        with self._lock:
            if self._tails.pop(tail.fd, None) is not None:
                self._read(tail)
                os.close(tail.fd)
                self._rouse()

    def join(self, timeout: float) -> None:
        """Wait, without pipes, until everything is passed on; a blocked terminal may prevent it."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _begin(self) -> None:
        self._alarm = os.pipe()
        os.set_blocking(self._alarm[1], False)
        # A daemon: it waits for the application's standard error, which may never be read.
        thread = threading.Thread(target=self._run, name="keisei-stderr", daemon=True)
        self._is_reading = True
        try:
            thread.start()
        except RuntimeError as error:
            self._end()
            raise BlockingIOError(errno.EAGAIN, str(error)) from error
        self._thread = thread

    def _end(self) -> None:
        self._is_reading = False
        for fd in self._alarm:
            os.close(fd)

    def _rouse(self) -> None:
        if self._is_reading:
            with contextlib.suppress(BlockingIOError):  # it has enough to wake up for
                os.write(self._alarm[1], b"!")

    def _read(self, tail: StderrTail) -> None:
        for _ in range(_MOST // _CHUNK):
            try:
                chunk = os.read(tail.fd, _CHUNK)
            except OSError:
                return  # nothing there now
            if not chunk:
                tail.has_ended = True
                return
            tail.text = (tail.text + chunk)[-TAIL - 1 :]
            self._unwritten.append(chunk)

    # in the thread

    def _run(self) -> None:
        while True:
            with self._lock:
                chunks = list(self._unwritten)
                self._unwritten.clear()
                if not chunks and not self._tails:
                    self._end()
                    return
                poll, alarm = self._poll(), self._alarm[0]
            for chunk in chunks:
                _pass_on(chunk)
            ready = poll.poll(0 if chunks else None)
            with self._lock:
                for fd, _ in ready:
                    if fd == alarm:
                        os.read(fd, _CHUNK)
                    elif fd in self._tails:
                        self._read(self._tails[fd])

    def _poll(self) -> select.poll:
        poll = select.poll()
        poll.register(self._alarm[0], select.POLLIN)
        for fd, tail in self._tails.items():
            if not tail.has_ended:
                poll.register(fd, select.POLLIN)
        return poll


def _pass_on(chunk: bytes) -> None:
    """Write to the application's standard error, if it has one."""
    with contextlib.suppress(OSError):
        while chunk:
            try:
                chunk = chunk[os.write(STDERR, chunk) :]
            except BlockingIOError:
                room = select.poll()
                room.register(STDERR, select.POLLOUT)
                room.poll()
