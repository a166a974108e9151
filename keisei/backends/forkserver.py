"""The fork server's own process: imports once, then forks a worker for each request.

Unlike multiprocessing's, it has no name in the file system that a killed application could
leave behind, serves only the process that started it, and dies with it.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import struct
import sys

from keisei.backends import child

NUMBER = struct.Struct("<q")
LENGTH = struct.Struct("<I")
MAX_FDS = 32
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


def main(request: int, lifeline: int, path: list[str]) -> None:
    """Serve until the application closes its end of the ``request`` socket.

    A request is a length, then that many bytes naming modules to import first, with
    descriptors: a pipe to read the process from, a pipe to write to (the pid, or minus an errno;
    later the exit code), then those that the process inherits.
    """
    sys.path[:] = path
    child.lead_own_group()
    own_lifeline = child.tie_to(lifeline)
    with socket.socket(fileno=request) as requests:
        _serve(requests, lifeline, own_lifeline)


def _serve(requests: socket.socket, lifeline: int, own_lifeline: int) -> None:
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    old_handler = signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    reports: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if woken in ready:
                os.read(woken, 4096)
                _reap(reports)
            if requests.fileno() not in ready:
                continue
            modules, fds = _receive(requests)
            if not fds:
                return
            data, report, *inherited = fds
            _import(modules)
            try:
                pid = os.fork()
            except OSError as error:
                pid = -(error.errno or errno.EAGAIN)
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, old_handler)
                for fd in (report, woken, waker, own_lifeline, *reports.values()):
                    os.close(fd)
                selector.close()
                requests.close()
                _become_worker(data, inherited, lifeline)
            for fd in (data, *inherited):
                os.close(fd)
            if _report(report, pid) and pid > 0:
                reports[pid] = report
            else:
                os.close(report)


def _receive(requests: socket.socket) -> tuple[list[str], list[int]]:
    """Return the modules and descriptors of the next request; nothing at the end of all."""
    head, fds, _, _ = socket.recv_fds(requests, LENGTH.size, MAX_FDS, _CLOEXEC)
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


def _import(modules: list[str]) -> None:
    for name in modules:
        if name not in sys.modules:
            try:
                __import__(name)
            except Exception as error:
                # The worker that needs the module will fail to import it too, and tell why.
                del error


def _become_worker(data: int, inherited: list[int], lifeline: int) -> None:
    """Run the worker in the forked process; never returns."""
    code = 1
    try:
        code = child.run(data, inherited, lifeline)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reap(reports: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        report = reports.pop(pid, None)
        if report is not None:
            _report(report, os.waitstatus_to_exitcode(status))
            os.close(report)


def _report(fd: int, number: int) -> bool:
    try:
        os.write(fd, NUMBER.pack(number))
    except OSError:
        return False  # the application no longer listens
    return True
