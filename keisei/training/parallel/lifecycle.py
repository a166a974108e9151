"""Lifecycle: a manager's states, from its description to its stop."""

from __future__ import annotations

import asyncio
import enum
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from keisei.backends.base import Backend
from keisei.config import ParallelConfig
from keisei.events import PoolStarted, PoolStopped
from keisei.exceptions import ManagerStateError
from keisei.ipc.event_loop import require_asyncio
from keisei.observers import Observer
from keisei.supervision.shutdown import to_completion
from keisei.training.parallel import notebook
from keisei.training.parallel.factory import pickle_factory
from keisei.training.parallel.named_weights import named_models
from keisei.training.parallel.pool import Pool
from keisei.training.parallel.run import Learner, first_weights
from keisei.training.parallel.seeds import draw_root
from keisei.training.parallel.settings import SettingsBook, SettingsSource
from keisei.training.parallel.streams import EventHub
from keisei.training.parallel.weights_source import WeightsSource
from keisei.worker import MAIN, Worker

if TYPE_CHECKING:
    import torch


class _State(enum.StrEnum):
    NEW = "not started"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Lifecycle:
    """Starts and stops a pool, and answers in which state it is.

    A manager that is dropped without ``stop`` gives a ``ResourceWarning``, and its workers end.
    """

    def __init__(  # noqa: PLR0913 - what a pool consists of
        self,
        worker: Callable[[], Worker],
        *,
        model: torch.nn.Module | None = None,
        models: Mapping[str, WeightsSource] | None = None,
        learner: Learner | None = None,
        settings: SettingsSource | None = None,
        config: ParallelConfig | Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
        backend: Backend | None = None,
    ) -> None:
        """Describe a pool; nothing is started yet.

        Args:
            worker: A picklable callable without arguments that returns a ``Worker``: a class of
                a module, or a ``functools.partial`` of one. Called once in each process.
            model: Its state dict is version 1 of the weights "main".
            models: Modules or state dicts by name of weights, version 1 of each; "main" is what
                ``model`` is.
            learner: For ``run``. Without a ``model`` its state dict is version 1 of "main".
            settings: What workers begin with, as ``context.settings``: picklable values by name,
                or a callable that returns them for a worker id, which is how workers get
                different environments. ``configure`` changes them.
            config: A ``ParallelConfig``, or a mapping that validates to one.
            observers: Objects with ``on_event(event)``, called for every event.
            backend: Starts the workers, in the place of the one that ``config.backend`` names;
                this manager's alone. ``keisei.testing.conformance`` tells whether it is sound.

        Raises:
            ConfigurationError: The configuration cannot work; every problem is listed.
            SerializationError: ``worker``, or one of the settings, cannot be sent to a process.
            TypeError: ``worker`` is not callable, or ``settings`` are no mapping with names that
                are text.
            WeightsError: A key of ``models`` is no name, or there are two of "main".
        """
        self.config = ParallelConfig.of(config)
        in_processes = backend is not None or self.config.backend != "inline"
        self._factory = pickle_factory(worker, for_processes=in_processes)
        self._models = named_models(model, models)
        self._settings = SettingsBook(settings, self.config.num_workers)
        self._learner = learner
        self._backend = backend
        self._hub = EventHub(observers)
        self._observers = self._hub.observers
        self._seed = self.config.seed if self.config.seed is not None else draw_root()
        self._state = _State.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: Pool | None = None
        self._if_dropped: weakref.finalize[..., Lifecycle] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._stop_requested = False
        self._started_at = 0.0
        self._cell = notebook.current_cell()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.stop()
        except Exception as problem:
            if error is None:
                raise
            error.add_note(f"stopping the pool failed too: {problem!r}")

    async def start(self) -> None:
        """Start every worker and wait until all are ready.

        When cancelled, or when it raises, every process is gone.

        Raises:
            WorkerStartError: A worker's imports, factory or ``setup`` raised, at its first start;
                or there are weights and it has nothing to load them into.
            PoolExhausted: Workers ended while starting, more often than the policy allows.
            ManagerStateError: It was started before, or stopped meanwhile; or the event loop is
                not asyncio's.
        """
        if self._state is not _State.NEW:
            raise ManagerStateError(
                f"this manager is {self._state}; it serves once, so make a new one"
            )
        self._loop = require_asyncio()
        if self._cell is not None:
            await notebook.take_over(self, self._cell)
        self._state = _State.STARTING
        self._started_at = time.monotonic()
        pool = self._pool = Pool(
            self.config,
            self._factory,
            self._seed,
            self._hub.publish,
            self._backend,
            self._settings,
        )
        self._if_dropped = weakref.finalize(self, _dropped, pool, self._loop)
        self._if_dropped.atexit = False  # workers end with the application
        try:
            await pool.backend.open()
            if self._stop_requested:
                pool.over.set()
            first = self._models
            if MAIN not in first and self._learner is not None:
                grace = self.config.shutdown_timeout
                own = await first_weights(self._learner, grace=grace, wait_over=self.wait_over)
                first = {MAIN: own, **first}
            for name, weights in first.items():
                if self._stopping is None:
                    await pool.synchronizer.push(weights, name)
            await pool.fill()
        except BaseException:
            await self.stop()
            raise
        if self._stopping is not None:
            await to_completion(_outcome(self._stopping))
            raise ManagerStateError("this manager was stopped while it was starting")
        self._state = _State.RUNNING
        self._hub.publish(PoolStarted(pool.num_workers))

    async def stop(self) -> None:
        """End every worker and return when all are gone.

        Workers finish the experience that they are collecting and tear down, within
        ``shutdown_timeout``; then SIGTERM and SIGKILL follow. May be called at any time, from
        several tasks, and again: a second call shortens the grace. It is carried to its end
        even if the caller is cancelled.
        """
        if self._pool is None:
            self._state = _State.STOPPED
            return
        pool = self._started()
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(
                self._stop(pool), name="keisei-stop"
            )
        elif not self._stopping.done():
            pool.supervisor.hurry()
        await to_completion(_outcome(self._stopping))

    async def _stop(self, pool: Pool) -> None:
        self._state = _State.STOPPING
        self._stop_requested = True
        pool.over.set()
        try:
            await pool.close()
        finally:
            self._state = _State.STOPPED
            if self._if_dropped is not None:
                self._if_dropped.detach()
            pool.flow.wake()
            self._hub.publish(PoolStopped(len(pool.supervisor.incidents)))
            self._hub.close()

    def request_stop(self) -> None:
        """Have ``run()`` and ``experiences()`` end in an orderly way, soon.

        Returns at once. Call it in the manager's event loop, from a signal handler of the
        application for example; from another thread with ``loop.call_soon_threadsafe``.
        """
        self._stop_requested = True
        if self._pool is not None:
            self._pool.over.set()
            self._pool.flow.wake()

    async def wait_over(self) -> None:
        """Return when a stop was requested or the pool has failed for good."""
        await self._started().over.wait()

    @property
    def state(self) -> str:
        """What it is: "not started", "starting", "running", "stopping" or "stopped"."""
        return self._state.value

    @property
    def is_stop_requested(self) -> bool:
        """Whether ``request_stop`` or ``stop`` was called."""
        return self._stop_requested

    @property
    def is_healthy(self) -> bool:
        """Whether the pool is running and every wanted slot has a ready worker."""
        pool = self._pool
        return (
            pool is not None
            and self._state is _State.RUNNING
            and len(pool.ready) == pool.num_workers
        )

    @property
    def _is_running(self) -> bool:
        return self._state is _State.RUNNING

    @property
    def _is_stopped(self) -> bool:
        return self._state is _State.STOPPED

    def _started(self, *, any_loop: bool = False) -> Pool:
        """Return the pool of a manager that was started, in the loop that started it."""
        if self._pool is None:
            raise ManagerStateError(
                "this manager is not started; use 'async with manager', 'await manager.start()' "
                "or 'await manager.run()'"
            )
        if not any_loop and self._loop is not require_asyncio():
            raise ManagerStateError(
                "this manager belongs to another event loop; use it in the loop that started it "
                "(asyncio.run_coroutine_threadsafe from other threads)"
            )
        return self._pool

    def _usable(self) -> Pool:
        """Return the pool of a manager that is running."""
        pool = self._started()
        pool.raise_failure()
        if self._state not in (_State.RUNNING, _State.STARTING):
            raise ManagerStateError(f"this manager is {self._state}; make a new one")
        return pool

    async def _hold_rounds(self, pool: Pool) -> None:
        """Let no round of the sync mode begin until ``pool.flow.release_rounds``.

        The running one is waited for, unless the pool is paused.
        """
        await pool.flow.hold_rounds(lambda: pool.is_paused or self._is_over(pool))

    def _is_over(self, pool: Pool) -> bool:
        return self._stop_requested or pool.supervisor.failure is not None


def _dropped(pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
    """End the workers of a manager that is gone and was not stopped."""
    if pool.is_closed:
        return  # its loop has ended before
    try:
        loop.call_soon_threadsafe(pool.close_now)
    except RuntimeError:  # the loop is closed
        pool.close_now()
    warnings.warn(
        "a ParallelManager was dropped without stop(); its workers are ended now: use 'async with "
        "manager', or await manager.stop()",
        ResourceWarning,
        stacklevel=2,
    )


async def _outcome(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    task.result()
