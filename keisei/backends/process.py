"""A worker's process, as aiomultiprocess has it; the only module that knows that package.

``aiomultiprocess.Process.__init__`` starts a manager server and blocks on it, and its ``join``
polls. So a subclass sets up what is needed by itself, and the supervisor waits on a pidfd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import aiomultiprocess
from aiomultiprocess.types import Unit

from keisei.backends.forkserver import server
from keisei.backends.popen import UNKNOWN, Popen
from keisei.child.serve import serve_worker, tell_escape


class _Process(BaseProcess):
    """A multiprocessing process started by our own launcher."""

    _start_method = None

    def __init__(
        self,
        name: str,
        unit: Unit,
        fds: Sequence[int],
        preload: Callable[[], Sequence[str]] | None,
        with_main: bool,
    ) -> None:
        super().__init__(
            target=aiomultiprocess.Process.run_async, args=(unit,), name=name, daemon=False
        )
        self._launching = (fds, preload, with_main, server.epoch)
        self.popen: Popen | None = None

    def run(self) -> None:
        """Serve the worker, in its own process."""
        try:
            super().run()
        except (SystemExit, KeyboardInterrupt) as error:
            tell_escape(error)
            raise

    def _Popen(self, _: _Process) -> Popen:  # noqa: N802 - multiprocessing's name
        self.popen = Popen(self, *self._launching)
        return self.popen

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_launching"}


class WorkerProcess(aiomultiprocess.Process):
    """A process that serves one incarnation on an event loop of its own."""

    def __init__(
        self,
        name: str,
        fds: Sequence[int],
        stderr_fd: int,
        crash_fd: int,
        preload: Callable[[], Sequence[str]] | None,
        with_main: bool,
    ) -> None:
        """Describe the process; ``start`` (blocking) starts it.

        Args:
            name: Shown by ``multiprocessing.current_process().name`` in the worker.
            fds: The descriptors of its ``WorkerEndpoints``.
            stderr_fd: What becomes its standard error.
            crash_fd: Where a native crash writes its stack.
            preload: Tells what the fork server imports first; ``None`` spawns an interpreter.
            with_main: Import the application's main script, where the worker class lives.
        """
        self.unit = Unit(target=serve_worker, args=(), kwargs={}, namespace=None)
        fds = [*fds, stderr_fd, crash_fd]
        self.aio_process = _Process(name, self.unit, fds, preload, with_main)

    def exit_code(self) -> tuple[bool, int | None]:
        """Return whether it has ended, and its exit code, ``None`` if it cannot be known."""
        code = self.aio_process.exitcode
        return code is not None, None if code == UNKNOWN else code

    def close(self) -> None:
        """Forget the process and close what tells of its end, which is no longer waited for."""
        if self.aio_process.exitcode is not None:
            self.aio_process.close()
        elif self.aio_process.popen is not None:
            self.aio_process.popen.abandon()
