"""The application's side of the fork server; everything here blocks, and is called in threads."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from keisei.backends import interpreter, preparation
from keisei.backends.lifeline import lifeline
from keisei.child.forkserver import NUMBER, REQUEST
from keisei.child.surroundings import FOLDER

_END_PATIENCE = 8.0
"""Seconds that a server has to end what workers have left; a little more than it takes itself."""


@contextmanager
def closing(*fds: int) -> Iterator[None]:
    """Close ``fds`` in the end."""
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def closing_on_error(*fds: int) -> Iterator[None]:
    """Close ``fds`` if the block fails."""
    try:
        yield
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def read_number(fd: int) -> int | None:
    """Read what the server tells on a report pipe, ``None`` at its end."""
    data = b""
    while len(data) < NUMBER.size:
        part = os.read(fd, NUMBER.size - len(data))
        if not part:
            return None
        data += part
    number: int = NUMBER.unpack(data)[0]
    return number


class ForkServer:
    """A process that has imported what workers need and forks them in milliseconds.

    Attributes:
        pid: Its process id, ``None`` while it is not running.
        epoch: The number of aborts. A start belongs to the epoch in which it was described; an
            abort begins a new one, so that a start of before starts no new server.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._users = 0
        self.pid: int | None = None

    def acquire(self) -> None:
        """Keep the server, once running, until ``release``."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """End the server when its last user has released it."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._stop()

    def abort(self) -> None:
        """Kill the server although it is in use; starts that are under way fail. See ``epoch``.

        It may hang in an import. Workers that live go on without it.
        """
        with self._lock:
            self._stop(0.0)

    def forget(self) -> None:
        """Let go of the server in a forked copy of the application: it is the original's."""
        if self._socket is not None:
            self._socket.close()
        self._reset()

    def fork(self, data: int, fds: Sequence[int], epoch: int) -> tuple[int, int]:
        """Start a process; start the server first if it is not running.

        Args:
            data: A file that begins with a ``request``, which the server reads, and goes on with
                what the process reads; the caller keeps its own.
            fds: Descriptors that it inherits; the caller keeps its own.
            epoch: The one in which the start was described.

        Returns:
            The pid, and a descriptor from which the exit code can be read.

        Raises:
            OSError: There is no room for a process, or the server has ended or was aborted.
        """
        report, their_report = os.pipe()
        with closing_on_error(report):
            with closing(their_report):
                folder = os.open(".", FOLDER)
                with closing(folder):
                    asked = self._ask([data, their_report, folder, *fds], epoch)
            pid = read_number(report)
            if pid is None:
                self._end(asked)
                raise ChildProcessError("the fork server ended while it was starting a process")
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
        return pid, report

    def _ask(self, fds: Sequence[int], epoch: int) -> socket.socket:
        """Send a request, to a new server where none lives; return that server's socket."""
        with self._lock:
            if epoch != self.epoch:
                raise ChildProcessError("the fork server was ended before it was asked")
            if self._socket is not None:
                try:
                    socket.send_fds(self._socket, [REQUEST], fds)
                except (BrokenPipeError, ConnectionResetError):
                    self._stop()  # it had ended before it could read the request
                else:
                    return self._socket
            self._socket = self._start()
            socket.send_fds(self._socket, [REQUEST], fds)
            return self._socket

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                end = lifeline.read_end()
                self.pid = interpreter.start(
                    preparation.import_path(),
                    "keisei.child.forkserver.main",
                    (theirs.fileno(), end, os.getpid()),
                    [theirs.fileno(), end],
                )
            except BaseException:
                ours.close()
                raise
        return ours

    def _end(self, which: socket.socket) -> None:
        """End the server behind ``which``, unless it has been replaced already."""
        with self._lock:
            if self._socket is which:
                self._stop()

    def _stop(self, patience: float = _END_PATIENCE) -> None:
        """End the server; give it time to end what its workers have left, then kill it."""
        if self._socket is None or self.pid is None:
            return
        sock, self._socket = self._socket, None
        pid, self.pid = self.pid, None
        with sock:
            if patience:
                with contextlib.suppress(OSError):  # it is dead, or does not end: killed below
                    sock.shutdown(socket.SHUT_WR)
                    sock.settimeout(patience)
                    sock.recv(1)
            # The socket closes after it: a server that lives would end its workers with itself.
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)  # unless something else in the application has reaped it


server = ForkServer()
"""The one server of this process; not running until it is needed."""
os.register_at_fork(after_in_child=server.forget)
