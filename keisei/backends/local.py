"""Workers in processes of this machine, by fork server or spawn."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from keisei.backends import launch
from keisei.backends.preload import OWN_MODULES, default_preload, modules_named_in
from keisei.backends.process import WorkerProcess
from keisei.backends.stderr import StderrRelay, StderrTail
from keisei.child.process import STACKS_SIGNAL
from keisei.exceptions import ManagerStateError
from keisei.ipc import memory
from keisei.ipc.threads import aside, in_thread
from keisei.naming import public
from keisei.protocol.endpoints import WorkerEndpoints

_PROCESS_GROUP = 1 << 2
_EXIT_CODE_PATIENCE = 2.0
_STDERR_PATIENCE = 1.0
_UNDO_PATIENCE = 2.0
_MAX_REPORT = 1 << 18


class LocalBackend:
    """Starts each incarnation in a process of its own."""

    def __init__(
        self,
        factory: bytes,
        *,
        start_method: str,
        preload: Sequence[str] | None,
        max_concurrent_starts: int,
    ) -> None:
        """Prepare to run workers made by ``factory``, a pickle.

        Args:
            factory: Tells which modules are worth preloading, and whether the worker class
                lives in the application's main script.
            start_method: "forkserver" or "spawn".
            preload: What the fork server imports besides our own; ``None`` chooses.
            max_concurrent_starts: More than this many starts wait for one another.
        """
        modules = modules_named_in(factory)
        self._with_main = "__main__" in modules
        self._preload: tuple[str, ...] | None = None
        if start_method == "forkserver":
            chosen = default_preload(modules) if preload is None else tuple(preload)
            self._preload = (*OWN_MODULES, *chosen)
        self._starts = asyncio.Semaphore(max_concurrent_starts)
        self._stderr = StderrRelay()
        self._undoing: set[asyncio.Future[None]] = set()
        self._is_open = False

    async def open(self) -> None:
        """Keep the fork server, if any, from now on.

        Raises:
            ManagerStateError: This process is a worker that is importing the application's main
                script, which starts a pool when it is imported.
        """
        if launch.is_importing_main():
            raise ManagerStateError(
                "a worker process has imported the main script, which started a pool again; "
                "put what the script does under 'if __name__ == \"__main__\":'"
            )
        if self._preload is not None:
            launch.server.acquire()
        self._is_open = True

    async def start(self, endpoints: WorkerEndpoints, name: str) -> LocalProcess:
        """Start a process on ``endpoints``, which are taken over, in a thread.

        When cancelled, a process that is being started is ended as soon as there is one.

        Raises:
            OSError: It could not be started; everything is closed.
        """
        try:
            async with self._starts:
                start = self._described(endpoints, name)
                try:
                    starting = in_thread(start.run, start.undo)
                except OSError:
                    start.drop()
                    raise
                try:
                    await asyncio.shield(starting)
                except asyncio.CancelledError:
                    self._undoing.add(starting)
                    starting.add_done_callback(functools.partial(self._undo, start))
                    raise
        finally:
            endpoints.close()
        try:
            return LocalProcess(start.process, start.pidfd, start.crash_fd, start.stderr)
        except BaseException:
            self._keep(aside(start.undo))
            raise

    def _undo(self, start: _Start, started: asyncio.Future[None]) -> None:
        """Hear that a start is done, when nobody waits for it any more."""
        self._undoing.discard(started)
        if started.exception() is None:
            self._keep(aside(start.undo))

    def _keep(self, undoing: asyncio.Future[None]) -> None:
        self._undoing.add(undoing)
        undoing.add_done_callback(self._undoing.discard)

    def _described(self, endpoints: WorkerEndpoints, name: str) -> _Start:
        with contextlib.ExitStack() as undo:
            crash_fd = memory.anonymous_file("keisei-crash")
            undo.callback(os.close, crash_fd)
            stderr, their_stderr = self._stderr.pipe()
            undo.callback(stderr.close)
            undo.callback(os.close, their_stderr)
            fds = endpoints.detach()
            undo.pop_all()
        process = WorkerProcess(name, fds, their_stderr, crash_fd, self._preload, self._with_main)
        return _Start(process, [*fds, their_stderr], crash_fd, stderr)

    def abort_starts(self) -> None:
        """End the fork server, whose import of the preloaded modules may be what hangs."""
        if self._preload is not None:
            launch.server.epoch += 1
            aside(launch.server.abort)

    async def aclose(self) -> None:
        """Let the fork server go; it ends when nobody else keeps it.

        A start that was cancelled, and is still being undone, is waited for, unless it hangs.
        """
        was_open, self._is_open = self._is_open, False
        if was_open:
            deadline = asyncio.get_running_loop().time() + _UNDO_PATIENCE
            while self._undoing and (left := deadline - asyncio.get_running_loop().time()) > 0:
                await asyncio.wait(set(self._undoing), timeout=left)
            await asyncio.shield(aside(self._let_go))

    def close(self) -> None:
        """Let the fork server go at once, without an event loop."""
        was_open, self._is_open = self._is_open, False
        if was_open:
            self._let_go()

    def _let_go(self) -> None:
        if self._preload is not None:
            launch.server.release()
        self._stderr.join(_STDERR_PATIENCE)


class _Start:
    """A start that is under way, in a thread; owns the descriptors until it is done."""

    def __init__(
        self, process: WorkerProcess, fds: Sequence[int], crash_fd: int, stderr: StderrTail
    ) -> None:
        self.process = process
        self.crash_fd = crash_fd
        self.stderr = stderr
        self.pidfd: int | None = None
        self._fds = fds

    def run(self) -> None:
        """Start the process; all or nothing."""
        try:
            self.process.start()
            self.pidfd = self._opened_pidfd()
        except BaseException:
            self._close_ours()
            raise
        finally:
            self._close_theirs()

    def drop(self) -> None:
        """Close everything, in place of ``run``."""
        self._close_theirs()
        self._close_ours()

    def _close_theirs(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def _close_ours(self) -> None:
        os.close(self.crash_fd)
        self.stderr.close()

    def _opened_pidfd(self) -> int | None:
        if not hasattr(os, "pidfd_open"):
            return None
        try:
            return os.pidfd_open(self.process.pid)
        except ProcessLookupError:
            return None  # it has ended and was reaped already, which the report pipe tells
        except OSError:
            self._end()
            raise

    def undo(self) -> None:
        """End the process that nobody wants any more."""
        self._end()
        if self.pidfd is not None:
            os.close(self.pidfd)
        self._close_ours()

    def _end(self) -> None:
        self.process.kill()
        self.process.aio_process.join(_EXIT_CODE_PATIENCE)
        self.process.close()


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
        """Wait for its end and return its exit code, ``None`` if nobody can know it."""
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
            self._patience = self._loop.call_later(_EXIT_CODE_PATIENCE, self._settle, None)
            self._watch(self._sentinel, self._on_report)

    def _on_report(self) -> None:
        if not self._settled():
            # Its descriptors are closed, but it is still ending. Not worth a wait in the loop.
            self._unwatch()
            join = functools.partial(self._process.aio_process.join, _EXIT_CODE_PATIENCE)
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

    def dump_stacks(self) -> None:
        """Have it write its stacks into the crash file, even inside C code."""
        self._signal(STACKS_SIGNAL)

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


@public
@contextlib.contextmanager
def warm_fork_server() -> Iterator[None]:
    """Keep the fork server running between managers, so that each starts in milliseconds.

    Without it the server ends with the last manager that uses it.
    """
    launch.server.acquire()
    try:
        yield
    finally:
        launch.server.release()


__all__ = [
    "LocalBackend",
    "LocalProcess",
    "default_preload",
    "modules_named_in",
    "warm_fork_server",
]
