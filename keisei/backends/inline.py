"""Workers in the application's own process and loop: the same pool, for debugging.

Breakpoints, profilers and prints work as usual. A hook that is ``def`` blocks the event loop
for as long as it runs, and a crash of native code ends the application.
"""

from __future__ import annotations

import asyncio
import signal

from keisei.child.isolation import SharedProcess
from keisei.child.runtime import WorkerRuntime
from keisei.ipc import failures
from keisei.protocol.endpoints import WorkerEndpoints


class InlineBackend:
    """Starts each incarnation as a task."""

    async def open(self) -> None:
        """Nothing to prepare."""

    async def start(self, endpoints: WorkerEndpoints, name: str) -> InlineProcess:
        """Start a task that serves ``endpoints``."""
        return InlineProcess(endpoints, name)

    def abort_starts(self) -> None:
        """Nothing can hang here that would not hang the application."""

    async def aclose(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to give back."""


class InlineProcess:
    """A worker's task, in the shape of a process."""

    pid: int | None = None

    def __init__(self, endpoints: WorkerEndpoints, name: str) -> None:
        runtime = WorkerRuntime(endpoints, SharedProcess())
        self._task = asyncio.get_running_loop().create_task(runtime.serve(), name=name)
        # A task that is cancelled before its first step never gets to close them.
        self._task.add_done_callback(lambda _: endpoints.close())

    @property
    def has_exited(self) -> bool:
        """Whether the task is done."""
        return self._task.done()

    async def wait(self) -> int | None:
        """Wait for the task's end; -9 stands for one that was cancelled, 1 for an error."""
        await asyncio.wait([self._task])
        if self._task.cancelled():
            return -signal.SIGKILL
        return 1 if self._task.exception() is not None else self._task.result()

    def terminate(self) -> None:
        """Cancel the task."""
        self._task.cancel()

    def kill(self) -> None:
        """Cancel the task."""
        self._task.cancel()

    def dump_stacks(self, *, all_threads: bool = False) -> None:
        """A task that does not move is suspended; ``crash_report`` shows where."""

    def crash_report(self) -> str:
        """Return where the task is suspended, or the error that ended it, or ""."""
        if not self._task.done():
            frames = self._task.get_stack()
            lines = (f"{f.f_code.co_filename}:{f.f_lineno} {f.f_code.co_name}" for f in frames)
            return "\n".join(lines)
        error = None if self._task.cancelled() else self._task.exception()
        return "" if error is None else failures.trace(error)

    def stderr_tail(self) -> str:
        """Return "": its standard error is the application's."""
        return ""

    def state(self) -> str:
        """Return ""."""
        return ""

    def close(self) -> None:
        """Nothing to give back: the task closes its endpoints."""
