"""A worker's process, as aiomultiprocess has it; the only module that knows that package.

``aiomultiprocess.Process.__init__`` starts a manager server and blocks on it, and its ``join``
polls. So a subclass sets up what is needed by itself, and the supervisor waits on a pidfd.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import aiomultiprocess
from aiomultiprocess.types import Unit

from keisei.backends.child import Inherited
from keisei.backends.launch import Launched


STACKS_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
"""Makes a worker write its stacks; chosen far from what applications use."""


class _Process(BaseProcess):
    """A multiprocessing process started by our own launcher."""

    _start_method = None

    def __init__(
        self,
        name: str,
        unit: Unit,
        fds: Sequence[int],
        modules: Sequence[str] | None,
        with_main: bool,
    ) -> None:
        super().__init__(
            target=aiomultiprocess.Process.run_async, args=(unit,), name=name, daemon=False
        )
        self._launching = (fds, modules, with_main)

    @staticmethod
    def _Popen(process: _Process) -> Launched:  # noqa: N802 - multiprocessing's name
        return Launched(process, *process._launching)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_launching"}


class WorkerProcess(aiomultiprocess.Process):
    """A process that serves one incarnation on an event loop of its own."""

    def __init__(
        self,
        name: str,
        fds: Sequence[int],
        crash_fd: int,
        modules: Sequence[str] | None,
        with_main: bool,
    ) -> None:
        """Describe the process; ``start`` (blocking) starts it.

        Args:
            name: Shown by ``multiprocessing.current_process().name`` in the worker.
            fds: The descriptors of its ``WorkerEndpoints``.
            crash_fd: Where a native crash writes its stack.
            modules: What the fork server imports first; ``None`` spawns an interpreter.
            with_main: Import the application's main script, where the worker class lives.
        """
        self.unit = Unit(target=serve_worker, args=(), kwargs={}, namespace=None)
        self.aio_process = _Process(name, self.unit, [*fds, crash_fd], modules, with_main)

    def close(self) -> None:
        """Forget the process, which has ended, and close what told of it."""
        self.aio_process.close()


async def serve_worker() -> None:
    """Serve one incarnation in this process; the entry of every worker process."""
    from keisei.backends.endpoints import WorkerEndpoints
    from keisei.backends.isolation import OwnProcess
    from keisei.backends.runtime import WorkerRuntime

    *fds, crash_fd = Inherited.fds
    faulthandler.enable(file=crash_fd, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, file=crash_fd, all_threads=True)
    code = await WorkerRuntime(WorkerEndpoints.attach(list(fds)), OwnProcess()).serve()
    if code:
        # Everything was told in frames; leave without multiprocessing's own report.
        await asyncio.get_running_loop().shutdown_asyncgens()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
