"""The application's side of starting processes: the lifeline, the fork server, spawning.

Everything here blocks for a moment and is called in threads.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, context, reduction, spawn, util
from multiprocessing import process as mp_process
from pathlib import Path
from typing import Any

from keisei.child.forkserver import LENGTH, NUMBER
from keisei.child.process import HELD_SIGNALS, reap
from keisei.ipc.memory import anonymous_file


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
        self._lock = threading.Lock()  # in a forked process a thread that is gone may hold it
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
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as "spawn" does
    return [os.fsdecode(spawn.get_executable()), *flags, "-c", code]


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start a process with signals blocked that it cannot take before it has prepared itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawn(command: list[str], fds: Sequence[int]) -> int:
    with _signals_held():
        pid: int = util.spawnv_passfds(command[0].encode(), command, list(fds))
    return pid


@contextmanager
def _closing(*fds: int) -> Iterator[None]:
    """Close ``fds`` in the end."""
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def _closing_on_error(*fds: int) -> Iterator[None]:
    """Close ``fds`` if the block fails."""
    try:
        yield
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


class ForkServer:
    """A process that has imported what workers need and forks them in milliseconds.

    Attributes:
        pid: Its process id, ``None`` while it is not running.
        epoch: The number of aborts. Whoever aborts counts first, in the thread where starts are
            described: one that was described before, and asks only later, starts no new server.
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
        """End the server, whoever uses it; starts that are under way fail. See ``epoch``."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Let go of the server in a forked copy of the application: it is the original's."""
        if self._socket is not None:
            self._socket.close()
        self._reset()

    def fork(
        self, data: int, fds: Sequence[int], modules: Sequence[str], epoch: int
    ) -> tuple[int, int]:
        """Start a process; start the server first if it is not running.

        Args:
            data: A file that the process reads first; the caller keeps its own.
            fds: Descriptors that it inherits; the caller keeps its own.
            modules: What the server imports first, unless it has.
            epoch: The one in which the start was described.

        Returns:
            The pid, and a descriptor from which the exit code can be read.

        Raises:
            OSError: There is no room for a process, or the server has ended or was aborted.
        """
        names = " ".join(modules).encode()
        request = LENGTH.pack(len(names)) + names
        report, their_report = os.pipe()
        with _closing_on_error(report):
            with _closing(their_report):
                asked = self._ask(request, [data, their_report, *fds], epoch)
            pid = _read_number(report)
            if pid is None:
                self._end(asked)
                raise ChildProcessError("the fork server ended while it was starting a process")
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
        return pid, report

    def _ask(self, request: bytes, fds: Sequence[int], epoch: int) -> socket.socket:
        """Send a request, to a new server if there is none or it has died, and return whom."""
        with self._lock:
            if epoch != self.epoch:
                raise ChildProcessError("the fork server was ended before it was asked")
            if self._socket is not None:
                try:
                    socket.send_fds(self._socket, [request], fds)
                except (BrokenPipeError, ConnectionResetError):
                    self._stop()  # it had ended before it could hear of the request
                else:
                    return self._socket
            self._socket = self._start()
            socket.send_fds(self._socket, [request], fds)
            return self._socket

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                end = lifeline.read_end()
                command = _command("keisei.child.forkserver.main", theirs.fileno(), end)
                self.pid = _spawn(command, [theirs.fileno(), end])
            except BaseException:
                ours.close()
                raise
        return ours

    def _end(self, which: socket.socket) -> None:
        """End the server behind ``which``, unless it has been replaced already."""
        with self._lock:
            if self._socket is which:
                self._stop()

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
os.register_at_fork(after_in_child=server.forget)


class Launched:
    """What multiprocessing calls a Popen: a started process, ours through any start method.

    Attributes:
        pid: Its process id.
        sentinel: Readable once it has ended.
        returncode: Its exit code once that was read; 255 also if nobody can know it.
        is_lost: Nobody can know it.
        is_abandoned: It cannot be killed; nobody waits for it, and ``sentinel`` is closed.
    """

    method = "keisei"

    def __init__(
        self,
        process: Any,
        fds: Sequence[int],
        modules: Sequence[str] | None,
        with_main: bool,
        epoch: int,
    ) -> None:
        """Start ``process`` (a ``BaseProcess``), by the fork server or in a new interpreter.

        Args:
            process: Pickled to the new process.
            fds: Descriptors that it inherits; the caller keeps its own.
            modules: What the fork server imports first; ``None`` spawns an interpreter.
            with_main: Import the application's main script in the new process.
            epoch: The fork server's when the start was described.
        """
        self.returncode: int | None = None
        self.is_lost = False
        self.is_abandoned = False
        self._lock = threading.Lock()
        self._forked = modules is not None
        # A file, not a pipe: nobody waits for a process that does not come to read it.
        data = anonymous_file("keisei-process")
        with _closing(data):
            with open(data, "wb", closefd=False) as stream:
                stream.write(self._pickled(process, with_main))
            os.lseek(data, 0, os.SEEK_SET)
            if modules is not None:
                self.pid, self.sentinel = server.fork(data, fds, modules, epoch)
            else:
                self.pid, self.sentinel = _spawn_worker(data, fds)

    def _pickled(self, process: Any, with_main: bool) -> bytes:
        buffer = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(_preparation(process.name, with_main), buffer)
            reduction.dump(process, buffer)
        finally:
            context.set_spawning_popen(None)
        return buffer.getvalue()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code once the process has ended; 255 if nobody can know it."""
        with self._lock:
            if self.returncode is None and not self.is_abandoned:
                code = self._reported(flag) if self._forked else self._waited(flag)
                self.is_lost = code == _LOST
                self.returncode = 255 if self.is_lost else code
            return self.returncode

    def _reported(self, flag: int) -> int | None:
        if not connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            return None
        code = _read_number(self.sentinel)
        return _LOST if code is None else code

    def _waited(self, flag: int) -> int | None:
        try:
            pid, status = reap(self.pid, flag)
        except ChildProcessError:
            return _LOST  # something else in the application has reaped it
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


_LOST = 1 << 16
"""In place of an exit code: nobody can know it."""


def _spawn_worker(data: int, fds: Sequence[int]) -> tuple[int, int]:
    """Start a fresh interpreter; return its pid and a pipe that ends with it."""
    report, their_report = os.pipe()
    with _closing_on_error(report), _closing(their_report):
        end = lifeline.read_end()
        command = _command("keisei.child.entry.main", data, their_report, end, list(fds))
        pid = _spawn(command, [data, their_report, end, *fds])
    return pid, report


def _preparation(name: str, with_main: bool) -> dict[str, Any]:
    """Return what multiprocessing prepares a new process with.

    Its own ``get_preparation_data`` settles the application's default start method for good.
    """
    current = mp_process.current_process()
    start = _original_dir()
    preparation = {
        "name": name,
        "authkey": current.authkey,
        "sys_path": [start if path == "" else path for path in sys.path],
        "sys_argv": sys.argv,
        "dir": str(Path.cwd()),
        "orig_dir": start,
    }
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        preparation["start_method"] = method
    if with_main:
        preparation.update(_main_script())
    return preparation


def _original_dir() -> str:
    """Return where the application was started: what "" in its path, and its script, refer to."""
    return mp_process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]


def _main_script() -> dict[str, str]:
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return {"init_main_from_name": main.__spec__.name}
    path = getattr(main, "__file__", None)
    if path is None:
        return {}
    return {"init_main_from_path": os.path.normpath(Path(_original_dir(), path))}


def is_importing_main() -> bool:
    """Return whether this process is a worker that is importing the application's main script."""
    return getattr(mp_process.current_process(), "_inheriting", False)


def _read_number(fd: int) -> int | None:
    data = b""
    while len(data) < NUMBER.size:
        part = os.read(fd, NUMBER.size - len(data))
        if not part:
            return None
        data += part
    number: int = NUMBER.unpack(data)[0]
    return number
