"""Workers in processes of this machine, by fork server or spawn."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

from keisei.backends import interpreter, mainscript
from keisei.backends.forkserver import server
from keisei.backends.handle import EXIT_CODE_PATIENCE, LocalProcess
from keisei.backends.preload import OWN_MODULES, default_preload, modules_named_in
from keisei.backends.process import WorkerProcess
from keisei.backends.stderr import StderrRelay, StderrTail
from keisei.exceptions import ManagerStateError
from keisei.ipc import memory
from keisei.ipc.kernel import has_pidfd
from keisei.ipc.threads import aside, in_thread
from keisei.naming import public
from keisei.protocol.endpoints import WorkerEndpoints

_STDERR_PATIENCE = 1.0
_UNDO_PATIENCE = 2.0


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
            preload: What the fork server imports besides our own; ``None`` chooses what comes
                from installed packages.
            max_concurrent_starts: More than this many starts wait for one another.
        """
        modules = modules_named_in(factory)
        self._with_main = "__main__" in modules
        self._preload: Callable[[], tuple[str, ...]] | None = None
        if start_method == "forkserver":
            # Asked for in the thread of a start: the user's modules are read and parsed for it.
            self._preload = functools.cache(functools.partial(_preload, modules, preload))
        self._starts = asyncio.Semaphore(max_concurrent_starts)
        self._stderr = StderrRelay()
        self._undoing: set[asyncio.Future[None]] = set()
        self._is_open = False

    async def open(self) -> None:
        """Keep the fork server, if any, from now on.

        Raises:
            ManagerStateError: This process is a worker that is importing the application's main
                script, which starts a pool when it is imported; or there is no Python interpreter
                that workers could be started with.
        """
        if mainscript.is_being_imported():
            raise ManagerStateError(
                "a worker process has imported the main script, which started a pool again; "
                "put what the script does under 'if __name__ == \"__main__\":'"
            )
        interpreter.require_interpreter()
        if self._preload is not None:
            server.acquire()
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
        """Called when a start is done that is no longer wanted."""
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
            server.epoch += 1
            aside(server.abort)

    async def aclose(self) -> None:
        """Let the fork server go; it ends when no other backend keeps it.

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
            server.release()
        self._stderr.join(_STDERR_PATIENCE)


def _preload(modules: set[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    return (*OWN_MODULES, *(default_preload(modules) if wanted is None else wanted))


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
        if not has_pidfd():
            return None
        try:
            return os.pidfd_open(self.process.pid)
        except ProcessLookupError:
            return None  # it has ended and was reaped already, which the report pipe tells
        except OSError:
            self._end()
            raise

    def undo(self) -> None:
        """End the process, which is no longer wanted."""
        self._end()
        if self.pidfd is not None:
            os.close(self.pidfd)
        self._close_ours()

    def _end(self) -> None:
        self.process.kill()
        self.process.aio_process.join(EXIT_CODE_PATIENCE)
        self.process.close()


@public
@contextlib.contextmanager
def warm_fork_server() -> Iterator[None]:
    """Keep the fork server running between managers, so that each starts in milliseconds.

    Without it the server ends with the last manager that uses it.
    """
    server.acquire()
    try:
        yield
    finally:
        server.release()


__all__ = [
    "LocalBackend",
    "LocalProcess",
    "default_preload",
    "modules_named_in",
    "warm_fork_server",
]
