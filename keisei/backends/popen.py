"""A started process in the shape that multiprocessing asks for, through either start method."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from keisei.backends import interpreter, preparation
from keisei.backends.forkserver import closing, closing_on_error, read_number, server
from keisei.backends.lifeline import lifeline
from keisei.child import forkserver, surroundings
from keisei.child.process import reap
from keisei.ipc.memory import anonymous_file

UNKNOWN = 1 << 16
"""In place of an exit code that cannot be known: multiprocessing takes ``None`` for "it runs"."""


class Popen:
    """A started process.

    Attributes:
        pid: Its process id.
        sentinel: Readable once it has ended.
        returncode: Its exit code, or ``UNKNOWN``, once it has ended and that was noticed.
        is_abandoned: It cannot be killed; its end is not waited for, and ``sentinel`` is closed.
    """

    method = "keisei"

    def __init__(
        self,
        process: Any,
        fds: Sequence[int],
        preload: Callable[[], Sequence[str]] | None,
        with_main: bool,
        epoch: int,
    ) -> None:
        """Start ``process`` (a ``BaseProcess``), by the fork server or in a new interpreter.

        It takes the application's environment, working directory and import path of now over.

        Args:
            process: Pickled to the new process.
            fds: Descriptors that it inherits; the caller keeps its own.
            preload: Tells what the fork server imports first; ``None`` spawns an interpreter.
            with_main: Import the application's main script in the new process.
            epoch: The fork server's when the start was described.
        """
        self.returncode: int | None = None
        self.is_abandoned = False
        self._lock = threading.Lock()
        self._forked = preload is not None
        path = preparation.import_path()
        told = surroundings.told(path)
        # A file, not a pipe: nothing waits for a process that does not come to read it.
        data = anonymous_file("keisei-process")
        with closing(data):
            with open(data, "wb", closefd=False) as stream:
                if preload is not None:
                    stream.write(forkserver.request(told, preload()))
                stream.write(preparation.pickled(process, self, with_main))
            os.lseek(data, 0, os.SEEK_SET)
            if self._forked:
                self.pid, self.sentinel = server.fork(data, fds, epoch)
            else:
                self.pid, self.sentinel = _spawn(data, fds, path, told)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, or ``UNKNOWN``, once the process has ended."""
        with self._lock:
            if self.returncode is None and not self.is_abandoned:
                self.returncode = self._reported(flag) if self._forked else self._waited(flag)
            return self.returncode

    def _reported(self, flag: int) -> int | None:
        if not connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            return None
        code = read_number(self.sentinel)
        return UNKNOWN if code is None else code

    def _waited(self, flag: int) -> int | None:
        try:
            pid, status = reap(self.pid, flag)
        except ChildProcessError:
            return UNKNOWN  # something else in the application has reaped it
        return os.waitstatus_to_exitcode(status) if pid == self.pid else None

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; multiprocessing calls this at the interpreter's exit."""
        if self.is_abandoned:
            return self.returncode
        may_block = self.returncode is None and timeout is not None
        if may_block and not connection.wait([self.sentinel], timeout):
            return None
        return self.poll(os.WNOHANG if timeout == 0.0 else 0)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            # It may have ended in between, which is what the caller wants.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def abandon(self) -> None:
        """Wait no longer for a process that does not end."""
        with self._lock:
            if not self.is_abandoned:
                self.is_abandoned = True
                self.close()

    def close(self) -> None:
        """Close what tells of the exit."""
        os.close(self.sentinel)


def _spawn(
    data: int, fds: Sequence[int], path: Sequence[str], told: tuple[Any, ...]
) -> tuple[int, int]:
    """Start a fresh interpreter; return its pid and a pipe that ends with it."""
    report, their_report = os.pipe()
    with closing_on_error(report), closing(their_report):
        end = lifeline.read_end()
        args = (data, their_report, end, list(fds), told)
        pid = interpreter.start(
            path, "keisei.child.entry.main", args, [data, their_report, end, *fds]
        )
    return pid, report
