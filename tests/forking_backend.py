"""A backend of somebody else's: it forks the application itself. Its faults are added by tests."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import warnings
from pathlib import Path
from typing import NoReturn

from keisei.child.isolation import OwnProcess
from keisei.child.process import STACKS_SIGNAL
from keisei.child.runtime import WorkerRuntime
from keisei.ipc import memory
from keisei.protocol.endpoints import WorkerEndpoints
from process_ends import end_of


class ForkedProcess:
    """A forked worker; its end is told by a descriptor."""

    def __init__(self, pid: int, crash_fd: int) -> None:
        self.pid = self.number = pid
        self.has_exited = False
        self.crash_fd = crash_fd
        self.end = end_of(pid)
        loop = asyncio.get_running_loop()
        self.exit: asyncio.Future[int] = loop.create_future()
        loop.add_reader(self.end, self.on_end)

    def on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.end)
        self.has_exited = True
        self.reap()

    def reap(self) -> None:
        """Leave the rest of the group to ``kill``."""
        _, status = os.waitpid(self.number, 0)
        if not self.exit.done():
            self.exit.set_result(os.waitstatus_to_exitcode(status))

    async def wait(self) -> int | None:
        return await asyncio.shield(self.exit)

    def terminate(self) -> None:
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)

    def dump_stacks(self, *, all_threads: bool = False) -> None:
        self.send(STACKS_SIGNAL)

    def send(self, number: int) -> None:
        if not self.has_exited:
            os.kill(self.number, number)

    def crash_report(self) -> str:
        return os.pread(self.crash_fd, 1 << 16, 0).decode()

    def stderr_tail(self) -> str:
        return ""

    def state(self) -> str:
        try:
            return Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return ""

    def close(self) -> None:
        os.close(self.end)
        os.close(self.crash_fd)


class ForkingBackend:
    """Forks; ``process`` is what handles are made of."""

    def __init__(self, process: type[ForkedProcess] = ForkedProcess) -> None:
        self.process = process
        self.started: list[ForkedProcess] = []

    async def open(self) -> None:
        pass

    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        crash_fd = -1
        try:
            crash_fd = memory.anonymous_file("keisei-crash")
            process = self.fork(endpoints, crash_fd)
        except OSError:
            self.failed(crash_fd)
            raise
        finally:
            endpoints.close()
        self.started.append(process)
        try:
            await asyncio.wait([process.exit], timeout=0)
        except asyncio.CancelledError:
            self.cancelled(process)
            raise
        return process

    def failed(self, crash_fd: int) -> None:
        if crash_fd >= 0:
            os.close(crash_fd)

    def cancelled(self, process: ForkedProcess) -> None:
        process.kill()
        process.on_end()
        process.close()

    def fork(self, endpoints: WorkerEndpoints, crash_fd: int) -> ForkedProcess:
        fds = endpoints.detach()
        with warnings.catch_warnings():
            # The other threads are pytest's, and the child does not need them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self.serve(fds, crash_fd)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(PermissionError):
            os.setpgid(pid, pid)
        try:
            return self.process(pid, crash_fd)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def serve(self, fds: list[int], crash_fd: int) -> NoReturn:
        """Be the worker; never returns."""
        code = 1
        try:
            gc.disable()  # it would close numbers that are others' by now
            os.setpgid(0, 0)
            close_all_but({0, 1, 2, crash_fd, *fds})
            self.heed_signals(crash_fd)
            code = asyncio.run(WorkerRuntime(WorkerEndpoints.attach(fds), OwnProcess()).serve())
        finally:
            os._exit(code)

    def heed_signals(self, crash_fd: int) -> None:
        faulthandler.enable(file=crash_fd)
        faulthandler.register(STACKS_SIGNAL, file=crash_fd)

    def abort_starts(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


def close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
