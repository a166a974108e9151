"""The application's side of starting processes: the lifeline, the fork server, spawning.

Everything here blocks for a moment and is called in threads.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import context, reduction, spawn, util
from typing import Any

from keisei.backends.forkserver import LENGTH, NUMBER


class _Lifeline:
    """A pipe whose write end this process alone holds: when it closes, every child is killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: tuple[int, int] | None = None

    def read_end(self) -> int:
        """Return the end that children are tied to."""
        with self._lock:
            if self._ends is None:
                self._ends = os.pipe()
            return self._ends[0]

    def cut(self) -> None:
        """Kill every child that is tied to this process, as its own death would."""
        ends, self._ends = self._ends, None
        if ends is not None:
            for fd in ends:
                os.close(fd)


lifeline = _Lifeline()
# At exit multiprocessing joins its children; they must be gone by then. A forked copy of the
# application must not keep its workers alive.
atexit.register(lifeline.cut)
os.register_at_fork(after_in_child=lifeline.cut)


def _command(entry: str, *args: object) -> list[str]:
    """Return the command line that calls ``entry`` in a fresh interpreter.

    The import path is set before the package is imported: it may be the only way to find it.
    """
    path = list(sys.path)
    module, function = entry.rsplit(".", 1)
    arguments = ", ".join(repr(arg) for arg in (*args, path))
    code = (
        f"import sys; sys.path[:] = {path!r}; "
        f"from {module} import {function}; {function}({arguments})"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [os.fsdecode(spawn.get_executable()), *flags, "-c", code]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start a process with SIGINT blocked, until it has left this process group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawn(command: list[str], fds: Sequence[int]) -> int:
    with _without_interrupts():
        pid: int = util.spawnv_passfds(command[0].encode(), command, list(fds))  # type: ignore[attr-defined]
    return pid


class ForkServer:
    """A process that has imported what workers need and forks them in milliseconds.

    Attributes:
        pid: Its process id, ``None`` while it is not running.
    """

    def __init__(self) -> None:
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

    def fork(self, data: bytes, fds: Sequence[int], modules: Sequence[str]) -> tuple[int, int]:
        """Start a process; start the server first if it is not running.

        Args:
            data: What the process reads first.
            modules: What the server imports first, unless it has.
            fds: Descriptors that it inherits; the caller keeps its own.

        Returns:
            The pid, and a descriptor from which the exit code can be read.

        Raises:
            OSError: There is no room for a process, or the server is gone.
        """
        with self._lock:
            if self._socket is None:
                self._start()
            assert self._socket is not None
            report, their_report = os.pipe()
            their_data, data_end = os.pipe()
            try:
                names = " ".join(modules).encode()
                request = LENGTH.pack(len(names)) + names
                socket.send_fds(self._socket, [request], [their_data, their_report, *fds])
            except OSError:
                self._stop()
                for fd in (report, data_end):
                    os.close(fd)
                raise
            finally:
                os.close(their_data)
                os.close(their_report)
        try:
            _write_all(data_end, data)
            pid = _read_number(report)
            if pid is None:
                with self._lock:
                    self._stop()
                raise ChildProcessError("the fork server ended while it was starting a process")
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
        except BaseException:
            os.close(report)
            raise
        return pid, report

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            end = lifeline.read_end()
            command = _command("keisei.backends.forkserver.main", theirs.fileno(), end)
            self.pid = _spawn(command, [theirs.fileno(), end])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours

    def _stop(self) -> None:
        if self._socket is None or self.pid is None:
            return
        self._socket.close()
        self._socket = None
        pid, self.pid = self.pid, None
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ChildProcessError, ProcessLookupError):
            return  # something else in the application has reaped it


server = ForkServer()
"""The one server of this process; not running until it is needed."""


def _forget_server() -> None:
    """A forked copy of the application must not talk to the original's server."""
    global server
    if server._socket is not None:
        server._socket.close()
    server = ForkServer()


os.register_at_fork(after_in_child=_forget_server)


class Launched:
    """What multiprocessing calls a Popen: a started process, ours through any start method."""

    method = "keisei"

    def __init__(
        self, process: Any, fds: Sequence[int], modules: Sequence[str] | None, with_main: bool
    ) -> None:
        """Start ``process`` (a ``BaseProcess``), by the fork server or in a new interpreter.

        Args:
            process: Pickled to the new process.
            fds: Descriptors that it inherits; the caller keeps its own.
            modules: What the fork server imports first; ``None`` spawns an interpreter.
            with_main: Import the application's main script in the new process.
        """
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._forked = modules is not None
        data = self._pickled(process, with_main)
        if modules is not None:
            self.pid, self.sentinel = server.fork(data, fds, modules)
        else:
            self.pid, self.sentinel = self._spawned(data, fds)

    def _pickled(self, process: Any, with_main: bool) -> bytes:
        preparation = spawn.get_preparation_data(process.name)
        preparation.pop("start_method", None)
        if not with_main:
            preparation.pop("init_main_from_name", None)
            preparation.pop("init_main_from_path", None)
        buffer = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(preparation, buffer)
            reduction.dump(process, buffer)
        finally:
            context.set_spawning_popen(None)
        return buffer.getvalue()

    @staticmethod
    def _spawned(data: bytes, fds: Sequence[int]) -> tuple[int, int]:
        """Start a fresh interpreter; the report pipe's end of file stands for the exit."""
        report, their_report = os.pipe()
        their_data, data_end = os.pipe()
        try:
            end = lifeline.read_end()
            command = _command("keisei.backends.child.main", their_data, end, list(fds))
            pid = _spawn(command, [their_data, their_report, end, *fds])
        except BaseException:
            os.close(report)
            os.close(data_end)
            raise
        finally:
            os.close(their_data)
            os.close(their_report)
        _write_all(data_end, data)
        return pid, report

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code once the process has ended; 255 if nobody can know it."""
        with self._lock:
            if self.returncode is None:
                self.returncode = self._reported(flag) if self._forked else self._waited(flag)
            return self.returncode

    def _reported(self, flag: int) -> int | None:
        from multiprocessing.connection import wait

        if not wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            return None
        code = _read_number(self.sentinel)
        return 255 if code is None else code

    def _waited(self, flag: int) -> int | None:
        try:
            pid, status = os.waitpid(self.pid, flag)
        except ChildProcessError:
            return 255  # something else in the application has reaped it
        return os.waitstatus_to_exitcode(status) if pid == self.pid else None

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; multiprocessing calls this at the interpreter's exit."""
        if self.returncode is None and timeout is not None:
            from multiprocessing.connection import wait

            if not wait([self.sentinel], timeout):
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
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return  # it has ended in between, which is what the caller wants

    def close(self) -> None:
        """Close what tells of the exit."""
        os.close(self.sentinel)


def _write_all(fd: int, data: bytes) -> None:
    """Write ``data`` and close; a reader that has died is noticed elsewhere."""
    try:
        with open(fd, "wb") as stream:
            stream.write(data)
    except BrokenPipeError:
        return


def _read_number(fd: int) -> int | None:
    data = b""
    while len(data) < NUMBER.size:
        try:
            part = os.read(fd, NUMBER.size - len(data))
        except InterruptedError:
            continue
        if not part:
            return None
        data += part
    number: int = NUMBER.unpack(data)[0]
    return number
