"""The fork server's own process: imports once, then forks a worker for each request.

Unlike multiprocessing's, it has no name in the file system that a killed application could
leave behind, serves only the process that started it, and dies with it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import selectors
import signal
import socket
import struct
import sys
from typing import NoReturn

from keisei.child import entry, process

NUMBER = struct.Struct("<q")
LENGTH = struct.Struct("<I")
MAX_FDS = 32


def main(request: int, lifeline: int, path: list[str]) -> None:
    """Serve until the application closes its end of the ``request`` socket.

    A request is a length, then that many bytes naming modules to import first, with
    descriptors: a file to read the process from, a pipe to write to (the pid, or minus an errno;
    later the exit code), then those that the process inherits.
    """
    sys.path[:] = path
    process.lead_own_group()
    own_lifeline = process.tie_to(lifeline)
    with socket.socket(fileno=request) as requests:
        _Server(requests, lifeline, own_lifeline).serve()


class _Server:
    """Forks, and tells how what it forked has ended."""

    def __init__(self, requests: socket.socket, lifeline: int, own_lifeline: int) -> None:
        self._requests = requests
        self._lifeline = lifeline
        self._woken, self._waker = os.pipe()
        self._reports: dict[int, int] = {}
        self._own = [own_lifeline, self._woken, self._waker]
        self._tried: set[str] = set()
        self._selector = selectors.DefaultSelector()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)

    def serve(self) -> None:
        """Serve until the application is done."""
        self._on_child = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker)
        self._selector.register(self._requests, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in self._selector.select()}
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._requests.fileno() in ready and not self._answer():
                return

    def _answer(self) -> bool:
        """Answer one request; return whether there was one."""
        modules, fds = _receive(self._requests)
        if not fds:
            return False
        self._import(modules)
        data, report, *inherited = fds
        process.flush()  # what is in a buffer now would be written once more by the forked process
        told = tell = -1
        try:
            told, tell = os.pipe()
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            os.close(tell)
            self._become_worker(told, data, report, inherited)
        if _report(report, pid) and pid > 0:
            self._reports[pid] = report
            _report(tell, pid)
        else:
            os.close(report)
        for fd in (data, *inherited, *([told, tell] if tell >= 0 else [])):
            os.close(fd)
        return True

    def _import(self, modules: list[str]) -> None:
        """Import, once, what was not imported.

        What is there afterwards is for every worker. It is frozen, so that no worker's collector
        touches it and its pages stay shared: a worker has less than half of the memory then.
        """
        missing = [name for name in modules if name not in sys.modules and name not in self._tried]
        for name in missing:
            self._tried.add(name)
            # The worker that needs the module will fail to import it too, and tell why.
            with contextlib.suppress(Exception, SystemExit):
                __import__(name)
        if missing:
            gc.collect()
            gc.freeze()

    def _become_worker(self, told: int, data: int, report: int, inherited: list[int]) -> NoReturn:
        """Run the worker in the forked process; never returns.

        It begins when the application was told of it. A server that is killed before leaves
        nobody who would end it.
        """
        try:
            if not os.read(told, 1):
                os._exit(1)
            os.close(told)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, self._on_child)
            self._selector.close()
            self._requests.close()
            for fd in (report, *self._own, *self._reports.values()):
                os.close(fd)
            entry.run_and_exit(data, inherited, self._lifeline)
        finally:
            os._exit(1)

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


def _receive(requests: socket.socket) -> tuple[list[str], list[int]]:
    """Return the modules and descriptors of the next request; nothing at the end of all."""
    head, fds, _, _ = socket.recv_fds(requests, LENGTH.size, MAX_FDS)
    for fd in fds:
        os.set_inheritable(fd, False)
    if len(head) < LENGTH.size:
        return [], []
    (length,) = LENGTH.unpack(head)
    names = b""
    while len(names) < length:
        part = requests.recv(length - len(names))
        if not part:
            return [], []
        names += part
    return names.decode().split(), fds


def _report(fd: int, number: int) -> bool:
    try:
        os.write(fd, NUMBER.pack(number))
    except OSError:
        return False  # the application no longer listens
    return True
