"""Workers in processes of this machine, by fork server or spawn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickletools
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from keisei.backends.endpoints import WorkerEndpoints
from keisei.backends import launch
from keisei.backends.process import WorkerProcess
from keisei.ipc import memory

_OWN_MODULES = ("torch", "keisei.backends.process", "keisei.backends.runtime")
_PROCESS_GROUP = 1 << 2
_EXIT_CODE_PATIENCE = 2.0


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
            max_concurrent_starts: Threads for starting.
        """
        modules = modules_named_in(factory)
        self._with_main = "__main__" in modules
        self._preload: tuple[str, ...] | None = None
        if start_method == "forkserver":
            chosen = default_preload(modules) if preload is None else tuple(preload)
            self._preload = (*_OWN_MODULES, *chosen)
        self._max_starts = max_concurrent_starts
        self._threads: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Keep the fork server, if any, from now on."""
        self._threads = ThreadPoolExecutor(self._max_starts, "keisei-start")
        if self._preload is not None:
            launch.server.acquire()

    async def start(self, endpoints: WorkerEndpoints, name: str) -> LocalProcess:
        """Start a process on ``endpoints``, in a thread.

        Cancelling waits for the start that is under way and ends it again.
        """
        crash_fd = memory.anonymous_file("keisei-crash")
        fds = endpoints.detach()
        process = WorkerProcess(name, fds, crash_fd, self._preload, self._with_main)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, process.start)
            handle = LocalProcess(process, crash_fd)
        except BaseException:
            os.close(crash_fd)
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return handle

    def abort_starts(self) -> None:
        """End the fork server, whose import of the preloaded modules may be what hangs."""
        if self._preload is not None and launch.server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(launch.server.pid, signal.SIGKILL)

    async def aclose(self) -> None:
        """Let the fork server go; it ends when nobody else keeps it."""
        threads, self._threads = self._threads, None
        if threads is None:
            return
        if self._preload is not None:
            await asyncio.get_running_loop().run_in_executor(threads, launch.server.release)
        threads.shutdown(wait=True)


class LocalProcess:
    """A worker's process, watched through a pidfd.

    Signals go through the pidfd too, so they can never reach a stranger that was given the same
    pid later. Where there is no pidfd the report pipe tells of the end.
    """

    def __init__(self, process: WorkerProcess, crash_fd: int) -> None:
        self._process = process
        self._crash_fd = crash_fd
        self.pid: int = process.pid or 0
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int | None] = loop.create_future()
        self._collecting: asyncio.Task[None] | None = None
        self._loop = loop
        self._pidfd: int | None = None
        self._sentinel: int = process.aio_process.sentinel
        if hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                self._on_end()  # it has ended and was reaped already
                return
        self._watched = self._sentinel if self._pidfd is None else self._pidfd
        loop.add_reader(self._watched, self._on_end_noticed)

    @property
    def has_exited(self) -> bool:
        """Whether it is known to have ended."""
        return self._collecting is not None

    async def wait(self) -> int | None:
        """Wait for its end and return its exit code."""
        return await asyncio.shield(self._exit)

    def _on_end_noticed(self) -> None:
        self._loop.remove_reader(self._watched)
        self._on_end()

    def _on_end(self) -> None:
        if self._collecting is None:
            self._collecting = self._loop.create_task(self._collect_exit_code())

    async def _collect_exit_code(self) -> None:
        """Ask for the exit code: it may follow the end by a moment when the server forked it."""
        readable = self._loop.create_future()
        self._loop.add_reader(self._sentinel, _settle, readable)
        try:
            await asyncio.wait([readable], timeout=_EXIT_CODE_PATIENCE)
        finally:
            self._loop.remove_reader(self._sentinel)
        code = self._process.exitcode if readable.done() else None
        if not self._exit.done():
            self._exit.set_result(None if code == 255 else code)

    def terminate(self) -> None:
        """Send SIGTERM to the worker itself."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to its process group; safe after its own end."""
        if self._pidfd is None:
            if not self.has_exited:
                self._ignoring_absence(os.killpg, self.pid, signal.SIGKILL)
            return
        self._signal(signal.SIGKILL)
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL, None, _PROCESS_GROUP)
        except OSError:
            # An older kernel, or nobody is left; the leader still holds its group's number then.
            if not self.has_exited:
                self._ignoring_absence(os.killpg, self.pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Have it write its stacks into the crash file, even inside C code."""
        from keisei.backends.process import STACKS_SIGNAL

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
        return os.pread(self._crash_fd, min(size, 1 << 16), 0).decode(errors="replace")

    def state(self) -> str:
        """Return the state letter from ``/proc``, or "" where there is none."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0].decode()
        except (OSError, IndexError):
            return ""

    def close(self) -> None:
        """Give back every descriptor."""
        if not self.has_exited:
            self._loop.remove_reader(self._watched)
        for fd in (self._pidfd, self._crash_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._pidfd, self._crash_fd = None, -1
        if self._process.exitcode is not None:
            self._process.close()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def modules_named_in(pickled: bytes) -> set[str]:
    """Return the modules that unpickling would import, without unpickling."""
    modules: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            modules.add(str(argument).split(" ")[0])
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            modules.add(strings[-2])
        elif isinstance(argument, str):
            strings.append(argument)
    return modules


def default_preload(modules: set[str]) -> tuple[str, ...]:
    """Return what is worth importing before forking: the worker's modules.

    For a worker in the main script: the modules that the script has imported, since the script
    itself cannot be preloaded.
    """
    chosen = {name for name in modules if name not in ("__main__", "functools", "builtins")}
    if "__main__" in modules:
        main = sys.modules["__main__"]
        chosen |= set(_modules_of(vars(main).values()))
    return tuple(sorted(chosen))


def _modules_of(values: Sequence[object] | object) -> Iterator[str]:
    for value in list(values):  # type: ignore[call-overload]
        name = getattr(value, "__name__", None) if _is_module(value) else None
        name = name or getattr(value, "__module__", None)
        if isinstance(name, str) and name != "__main__" and name in sys.modules:
            yield name


def _is_module(value: object) -> bool:
    return isinstance(value, type(sys))


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


__all__ = ["LocalBackend", "LocalProcess", "warm_fork_server"]
