"""A worker's process as the supervisor has it: its end, its exit code, signals, what it left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

from keisei.backends.process import WorkerProcess
from keisei.backends.stderr import StderrTail
from keisei.child.process import ALL_STACKS_SIGNAL, STACKS_SIGNAL
from keisei.ipc.threads import aside

_PROCESS_GROUP = 1 << 2
EXIT_CODE_PATIENCE = 2.0
_MAX_REPORT = 1 << 18


class LocalProcess:
    """A worker's process, watched through a pidfd.

    Signals go through the pidfd too, so they can never reach a stranger that was given the same
    pid later. Where there is no pidfd the report pipe tells of the end.

    Attributes:
        pid: Its process id.
        has_exited: It is known to have ended.
    """

    def __init__(
        self, process: WorkerProcess, pidfd: int | None, crash_fd: int, stderr: StderrTail
    ) -> None:
        """Watch ``process`` in the running loop; takes the descriptors over."""
        self.pid: int = process.pid
        self.has_exited = False
        self._process = process
        self._crash_fd = crash_fd
        self._stderr = stderr
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int | None] = self._loop.create_future()
        self._patience: asyncio.TimerHandle | None = None
        self._sentinel: int = process.aio_process.sentinel
        self._watched: int | None = None
        self._watch(self._sentinel if pidfd is None else pidfd, self._on_end)

    async def wait(self) -> int | None:
        """Wait for its end and return its exit code, ``None`` if it cannot be known."""
        return await asyncio.shield(self._exit)

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._loop.add_reader(fd, callback)
        self._watched = fd

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._loop.remove_reader(self._watched)
            self._watched = None
        if self._patience is not None:
            self._patience.cancel()

    def _on_end(self) -> None:
        """Ask for the exit code, which the fork server may tell a moment after the end."""
        self.has_exited = True
        self._unwatch()
        if not self._settled():
            self._patience = self._loop.call_later(EXIT_CODE_PATIENCE, self._settle, None)
            self._watch(self._sentinel, self._on_report)

    def _on_report(self) -> None:
        if not self._settled():
            # Its descriptors are closed, but it is still ending. Not worth a wait in the loop.
            self._unwatch()
            join = functools.partial(self._process.aio_process.join, EXIT_CODE_PATIENCE)
            aside(join).add_done_callback(lambda _: self._settle(self._process.exit_code()[1]))

    def _settled(self) -> bool:
        is_known, code = self._process.exit_code()
        if is_known:
            self._settle(code)
        return is_known

    def _settle(self, code: int | None) -> None:
        self._unwatch()
        if not self._exit.done() and not self._loop.is_closed():
            self._exit.set_result(code)

    def terminate(self) -> None:
        """Send SIGTERM to the worker itself."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to its process group; safe after its own end."""
        self._signal(signal.SIGKILL)
        if self._pidfd is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL, None, _PROCESS_GROUP)
                return
        # An older kernel, or nobody is left. Its group's number is its own as long as it lives;
        # what it leaves behind is ended when it is reaped.
        if not self.has_exited:
            self._ignoring_absence(os.killpg, self.pid, signal.SIGKILL)

    def dump_stacks(self, *, all_threads: bool = False) -> None:
        """Have it write its stacks into the crash file, even inside C code."""
        self._signal(ALL_STACKS_SIGNAL if all_threads else STACKS_SIGNAL)

    def _signal(self, number: int) -> None:
        if self._pidfd is not None:
            self._ignoring_absence(signal.pidfd_send_signal, self._pidfd, number)
        elif not self.has_exited:
            self._ignoring_absence(os.kill, self.pid, number)

    @staticmethod
    def _ignoring_absence(send: object, *args: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(*args)  # type: ignore[operator]

    def crash_report(self) -> str:
        """Return what faulthandler has written: a native crash, or a dump of stacks."""
        if self._crash_fd < 0:
            return ""
        size = os.fstat(self._crash_fd).st_size
        start = max(0, size - _MAX_REPORT)
        return os.pread(self._crash_fd, size - start, start).decode(errors="replace")

    def stderr_tail(self) -> str:
        """Return the last lines that it wrote to standard error, up to 4096 bytes."""
        return self._stderr.read()

    def state(self) -> str:
        """Return the state letter from ``/proc``, or "" where there is none."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
            return stat.rpartition(b")")[2].split()[0].decode()
        except (OSError, IndexError):
            return ""

    def close(self) -> None:
        """Give back every descriptor."""
        self._settle(None)
        for fd in (self._pidfd, self._crash_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._pidfd, self._crash_fd = None, -1
        self._stderr.close()
        self._process.close()
