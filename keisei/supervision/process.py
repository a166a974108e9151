"""What every backend's running worker offers to the supervisor."""

from __future__ import annotations

from typing import Protocol


class ProcessHandle(Protocol):
    """One started incarnation."""

    @property
    def pid(self) -> int | None:
        """Its process id, ``None`` where it shares the application's process."""
        ...

    @property
    def has_exited(self) -> bool:
        """Whether it is known to have ended."""
        ...

    async def wait(self) -> int | None:
        """Wait for its end; return the exit code, minus a signal's number, ``None`` if unknown.

        Safe to cancel; any number of tasks may wait.
        """
        ...

    def terminate(self) -> None:
        """Ask it to end at once (SIGTERM); no effect after its end."""
        ...

    def kill(self) -> None:
        """End it and all processes of its group (SIGKILL); also after its own end."""
        ...

    def dump_stacks(self, *, all_threads: bool = False) -> None:
        """Have it write its main thread's Python stack where ``crash_report`` finds it.

        Args:
            all_threads: The stacks of all its threads. It may crash then, where other threads run.
        """
        ...

    def crash_report(self) -> str:
        """Return what it wrote about its own end, such as a native stack, or ""."""
        ...

    def stderr_tail(self) -> str:
        """Return the last lines that it wrote to standard error up to now, or "".

        They have been, or will be, passed on to the application's standard error.
        """
        ...

    def state(self) -> str:
        """Return the kernel's one-letter process state, such as "T" for stopped, or ""."""
        ...

    def close(self) -> None:
        """Give back the descriptors; only after its end, or to abandon it."""
        ...
