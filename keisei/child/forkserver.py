"""The fork server's own process: imports once, then forks a worker for each request.

Unlike multiprocessing's, it has no name in the file system that a killed application could
leave behind, serves only the process that started it, and ends with it: it watches the lifeline,
and stays until it has ended all processes that workers have left.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import importlib
import marshal
import os
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from keisei.child import descendants, entry, generators, process, surroundings
from keisei.child.installed import file_of, is_installed
from keisei.ipc.kernel import has_pidfd

NUMBER = struct.Struct("<q")
LENGTH = struct.Struct("<I")
REQUEST = b"+"
MAX_FDS = 32
IMPORT_PATIENCE = 60.0
"""Seconds that one step of an import may keep the interpreter's lock, before the server ends."""
END_PATIENCE = 5.0
"""Seconds in which everything that is killed at the end has gone, unless it cannot be killed."""


def request(what: tuple[Any, ...], modules: Sequence[str]) -> bytes:
    """Return what the application writes before the description of a process.

    Args:
        what: The application's surroundings, as ``surroundings.told`` has them.
        modules: To be imported before the fork, unless they are.
    """
    body = marshal.dumps((what, list(modules)))
    return LENGTH.pack(len(body)) + body


def main(requests: int, lifeline: int, application: int) -> None:
    """Serve until the application closes its end of the ``requests`` socket, or ends.

    Whatever it has forked in C holds its ends of both; its own end is seen by its pid.

    A request is one byte, with descriptors: a file that begins with a ``request``, from which the
    process then reads on; a pipe to write to (the pid, or minus an errno; later the exit code);
    the working directory; then those that the process inherits.
    """
    process.lead_own_group()
    with socket.socket(fileno=requests) as ours:
        _Server(ours, lifeline, application).serve()


class _Server:
    """Forks workers, reports their exit codes, and ends processes that they leave behind."""

    def __init__(self, requests: socket.socket, lifeline: int, application: int) -> None:
        self._requests = requests
        self._lifeline = lifeline
        watched = _watched(application)
        self._ends = {lifeline, *watched}
        self._woken, self._waker = os.pipe()
        self._reports: dict[int, int] = {}
        self._own = [self._woken, self._waker, *watched]
        self._tried: set[str] = set()
        self._stamps: dict[str, tuple[int, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._orphans = descendants.Orphans()
        self._helpers: set[int] = set()
        self._adopts = process.adopt_orphans()
        if not self._adopts:
            # It has nothing to do at the application's end, and is killed with the others.
            self._own.append(process.tie_to(lifeline))
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)

    def serve(self) -> NoReturn:
        """Serve until the application is done; never returns."""
        self._on_child = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker)
        for fd in (self._requests.fileno(), self._woken, *self._ends):
            self._selector.register(fd, selectors.EVENT_READ)
        while True:
            ready = self._wait(self._orphans.patience())
            if self._ends & ready:
                self._end()
            if self._requests.fileno() in ready and not self._answer():
                self._end()

    def _wait(self, timeout: float | None) -> set[int]:
        """Wait for an event and reap processes that have ended; return the readable descriptors."""
        ready = {key.fd for key, _ in self._selector.select(timeout)}
        if self._woken in ready:
            os.read(self._woken, 4096)
            self._reap()
        if self._adopts and (self._woken in ready or not ready):
            self._orphans.end({*self._reports, *self._helpers})
        return ready

    def _end(self) -> NoReturn:
        """Kill every child and every process that they leave, until none is left; then end."""
        self._helpers.clear()
        for pid in self._reports:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        for fd in (self._requests.fileno(), *self._ends):
            self._selector.unregister(fd)
        deadline = time.monotonic() + END_PATIENCE
        self._orphans.end(())
        while self._adopts and descendants.children():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._wait(min(left, self._orphans.patience() or left))
            self._orphans.end(())
        os.killpg(0, signal.SIGKILL)
        os._exit(0)  # not reached: it leads that group

    def _answer(self) -> bool:
        """Answer one request; return whether there was one."""
        fds = _receive(self._requests)
        if not fds:
            return False
        data, report, folder, *inherited = fds
        told = tell = -1
        try:
            self._prepare(data, folder)
            told, tell = os.pipe()
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            os.close(tell)
            os.close(folder)
            self._become_worker(told, data, inherited)
        if _report(report, pid) and pid > 0:
            self._reports[pid] = report
            _report(tell, pid)
        else:
            os.close(report)
        for fd in (data, folder, *inherited, *([told, tell] if tell >= 0 else [])):
            os.close(fd)
        return True

    def _prepare(self, data: int, folder: int) -> None:
        """Be to the forked process what the application is now, with what it needs imported."""
        (length,) = LENGTH.unpack(_read(data, LENGTH.size))
        what, modules = marshal.loads(_read(data, length))  # noqa: S302 - the application's own
        surroundings.take(what, folder)
        missing = self._missing(modules)
        with self._watching() if missing else contextlib.nullcontext():
            if missing:
                self._import(missing)
            process.flush()  # each process would write the text in a buffer once more

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Watch for the application's end in a thread, while an import may hang."""
        stopped, stop = os.pipe()
        thread = threading.Thread(target=self._watch, args=(stopped,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.write(stop, b"!")  # to close it is not enough: an import may have forked a copy
            thread.join()  # no thread is there at a fork
            os.close(stop)
            os.close(stopped)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, stopped: int) -> None:
        poll = select.poll()
        for fd in (stopped, *self._ends):
            poll.register(fd, select.POLLIN)
        poll.register(self._requests, getattr(select, "POLLRDHUP", 0))
        ready: list[tuple[int, int]] = []
        while not ready:
            # An import that keeps the interpreter's lock stops this thread too, for so long.
            faulthandler.dump_traceback_later(IMPORT_PATIENCE, exit=True, file=process.STDERR)
            ready = poll.poll(1000 * IMPORT_PATIENCE / 4)
        if stopped not in dict(ready):
            self._end()

    def _missing(self, modules: Sequence[str]) -> list[str]:
        return [name for name in modules if name not in sys.modules and name not in self._tried]

    def _import(self, missing: list[str]) -> None:
        """Import, once, what was not imported.

        What is there afterwards is for every worker. It is frozen, so that no worker's collector
        touches it and its pages stay shared: a worker has less than half of the memory then.
        """
        before = descendants.children()
        for name in missing:
            self._tried.add(name)
            # The worker that needs the module will fail to import it too, and tell why.
            with contextlib.suppress(Exception, SystemExit):
                self._import_one(name)
            if "torch" in sys.modules:
                # With more, what a module computes while it is imported would leave threads that
                # a forked process waits for in vain.
                sys.modules["torch"].set_num_threads(1)
        self._helpers |= descendants.children() - before
        self._stamps |= {
            name: stamp
            for name in list(sys.modules)
            if name not in self._stamps and (stamp := _stamp(name)) is not None
        }
        generators.remember()
        gc.collect()
        gc.freeze()

    @staticmethod
    def _import_one(name: str) -> None:
        with surroundings.in_a_folder() if name == "torch" else contextlib.nullcontext():
            importlib.import_module(name)

    def _become_worker(self, told: int, data: int, inherited: list[int]) -> NoReturn:
        """Run the worker in the forked process; never returns.

        It begins when the application was told of it: a server that is killed before that would
        leave a process that is never ended.
        """
        try:
            if not os.read(told, 1):
                os._exit(1)
            os.close(told)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, self._on_child)
            self._selector.close()
            self._requests.close()
            # It keeps its own report open: the end of that pipe is the end of both, also where
            # the server is killed and the worker's end is seen in no other way.
            for fd in (*self._own, *self._reports.values()):
                os.close(fd)
            self._drop_edited()
            generators.refresh()
            entry.run_and_exit(data, inherited, self._lifeline)
        finally:
            os._exit(1)

    def _drop_edited(self) -> None:
        """Forget the user's own modules, if any has been edited since it was preloaded here."""
        if any(_stamp(name) != stamp for name, stamp in self._stamps.items()):
            generators.forget(frozenset(self._stamps))
            for name in self._stamps:
                sys.modules.pop(name, None)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = process.reap(None)
            except ChildProcessError:
                return
            if pid == 0:
                return
            report = self._reports.pop(pid, None)
            if report is not None:
                _report(report, os.waitstatus_to_exitcode(status))
                os.close(report)


def _watched(pid: int) -> list[int]:
    """Return a descriptor that becomes readable when our parent ends, if there is such a thing."""
    if pid != os.getppid() or not has_pidfd():
        return []
    return [os.pidfd_open(pid)]


def _stamp(name: str) -> tuple[int, int] | None:
    """Return what changes when the file of one of the user's own modules is edited."""
    path = None if name == "__main__" or is_installed(name) else file_of(name)
    if path is None:
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _receive(requests: socket.socket) -> list[int]:
    """Return the descriptors of the next request; none at the end of all."""
    _, fds, _, _ = socket.recv_fds(requests, len(REQUEST), MAX_FDS)
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def _read(fd: int, size: int) -> bytes:
    """Read ``size`` bytes of a file, and no more: somebody else reads on."""
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise OSError(errno.EIO, "the request is cut short")
        data += part
    return data


def _report(fd: int, number: int) -> bool:
    try:
        os.write(fd, NUMBER.pack(number))
    except OSError:
        return False  # the application no longer listens
    return True
