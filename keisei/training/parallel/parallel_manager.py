"""ParallelManager: the pool of workers as an application sees it."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import anyio.lowlevel
import torch

from keisei.backends.base import Backend
from keisei.config import ParallelConfig
from keisei.events import (
    Event,
    Incident,
    PoolEscalated,
    PoolPaused,
    PoolResumed,
    PoolScaled,
    PoolStarted,
    PoolStopped,
    UpdateCompleted,
    WeightsPushed,
)
from keisei.exceptions import CollectTimeout, ManagerStateError, WorkerLost
from keisei.ipc.weights import HasStateDict, tensors_of
from keisei.naming import public
from keisei.observers import Observer, ObserverSet
from keisei.supervision.shutdown import to_completion
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.communication import QueueInfo
from keisei.training.parallel.factory import pickle_factory
from keisei.training.parallel.pool import Pool
from keisei.training.parallel.run import Learner, RunReport, TrainingLoop, first_weights
from keisei.training.parallel.seeds import draw_root
from keisei.training.parallel.stats import PoolStats, WorkerInfo
from keisei.training.parallel.streams import EventStream, ExperienceStream
from keisei.worker import Worker


class _State(enum.StrEnum):
    NEW = "not started"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


@public
class ParallelManager:
    """Runs a pool of workers from inside an asyncio application.

    Use it as ``async with ParallelManager(...) as manager:``, or ``await manager.run()`` for the
    whole life with a learner. It belongs to the event loop that started it and serves once.
    It takes nothing global: no signal handler, no start method, no torch setting.
    """

    def __init__(
        self,
        worker: Callable[[], Worker],
        *,
        model: torch.nn.Module | None = None,
        learner: Learner | None = None,
        config: ParallelConfig | Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
        backend: Backend | None = None,
    ) -> None:
        """Describe a pool; nothing is started yet.

        Args:
            worker: A picklable callable without arguments that returns a ``Worker``: a class of
                a module, or a ``functools.partial`` of one. Called once in each process.
            model: Its state dict is weights version 1; without a model, the learner's is.
            learner: For ``run``.
            config: A ``ParallelConfig``, or a mapping that validates to one.
            observers: Objects with ``on_event(event)``, called for every event.
            backend: Starts the workers, in the place of the one that ``config.backend`` names;
                this manager's alone. ``keisei.testing.conformance`` tells whether it is sound.

        Raises:
            ConfigurationError: The configuration cannot work; every problem is listed.
            SerializationError: ``worker`` cannot be sent to a process.
        """
        self.config = ParallelConfig.of(config)
        self._factory = pickle_factory(worker)
        self._model = model
        self._learner = learner
        self._backend = backend
        self._observers = ObserverSet(observers)
        self._seed = self.config.seed if self.config.seed is not None else draw_root()
        self._state = _State.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: Pool | None = None
        self._streams: WeakSet[EventStream] = WeakSet()
        self._stopping: asyncio.Task[None] | None = None
        self._stop_requested = False
        self._over = asyncio.Event()
        self._started_at = 0.0
        self._num_pushes = self._bytes_pushed = self._num_not_finite = 0

    # life

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
            WorkerStartError: A worker's imports, factory or ``setup`` raised, at its first start.
            PoolExhausted: Workers ended while starting, more often than the policy allows.
            ManagerStateError: It was started before, or stopped meanwhile.
        """
        if self._state is not _State.NEW:
            raise ManagerStateError(
                f"this manager is {self._state}; it serves once, so make a new one"
            )
        self._state = _State.STARTING
        self._loop = asyncio.get_running_loop()
        self._started_at = time.monotonic()
        pool = self._pool = Pool(
            self.config, self._factory, self._seed, self._publish, self._backend
        )
        try:
            await pool.backend.open()
            weights: HasStateDict | Mapping[str, torch.Tensor] | None = self._model
            if weights is None and self._learner is not None:
                grace = self.config.shutdown_timeout
                weights = await first_weights(self._learner, grace=grace, wait_over=self.wait_over)
            if weights is not None and self._stopping is None:
                await pool.communicator.send_model_weights(weights)
            await pool.fill()
        except BaseException:
            await self.stop()
            raise
        if self._stopping is not None:
            await to_completion(_outcome(self._stopping))
            raise ManagerStateError("this manager was stopped while it was starting")
        self._state = _State.RUNNING
        self._publish(PoolStarted(pool.num_workers))

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
        self._over.set()
        try:
            await pool.close()
        finally:
            self._state = _State.STOPPED
            pool.flow.wake()
            self._publish(PoolStopped(len(pool.supervisor.incidents)))
            for stream in list(self._streams):
                stream.close()

    def request_stop(self) -> None:
        """Have ``run()`` and ``experiences()`` end in an orderly way, soon.

        Returns at once. Call it in the manager's event loop, from a signal handler of the
        application for example; from another thread with ``loop.call_soon_threadsafe``.
        """
        self._stop_requested = True
        self._over.set()
        if self._pool is not None:
            self._pool.flow.wake()

    @property
    def is_stop_requested(self) -> bool:
        """Whether ``request_stop`` or ``stop`` was called."""
        return self._stop_requested

    async def wait_over(self) -> None:
        """Return when a stop was requested or the pool has failed for good."""
        await self._over.wait()

    # experience

    def experiences(self) -> ExperienceStream:
        """Iterate over batches: ``async for batch in manager.experiences()``.

        Ends after ``request_stop`` or ``stop``. In sync mode a round is collected when the
        batches of the one before have been taken. Several iterators share the batches. Safe to
        cancel and to break out of: no batch is lost.

        Raises:
            PoolExhausted: The restart policy was exceeded.
        """
        self._usable()
        return ExperienceStream(self._next_batch)

    async def _next_batch(self) -> ExperienceBatch | None:
        pool = self._started()
        while not self._is_over(pool):
            batch = pool.flow.take_one()
            if batch is not None:
                return batch
            await pool.flow.wait_for(None, lambda: self._is_over(pool))
        pool.raise_failure()
        return None

    async def collect(
        self, min_steps: int | None = None, timeout: float | None = None
    ) -> list[ExperienceBatch]:
        """Return batches with at least ``min_steps`` environment steps together.

        Safe to cancel, and to call again after a timeout: what had arrived stays queued.

        Args:
            min_steps: In async mode ``None`` returns what is here, at least one batch. In sync
                mode it returns one round, ordered by worker; otherwise as many whole rounds as
                needed. After ``request_stop`` it returns at once, with what is here or nothing.
            timeout: Seconds; ``None`` waits without end.

        Raises:
            CollectTimeout: Too little arrived in time.
            PoolExhausted: The restart policy was exceeded.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        if not await self._wait_for_steps(pool, min_steps, timeout):
            states = ", ".join(
                f"worker {info.worker_id} is {info.state} ({info.phase})" for info in self.workers
            )
            came = "nothing"
            if min_steps is not None:
                came = f"{pool.flow.num_steps_queued} of {min_steps} steps"
            raise CollectTimeout(f"{came} arrived in {timeout} s; {states}")
        self._usable()
        return pool.flow.take(None if self.config.mode == "sync" else min_steps)

    async def collect_update(
        self, min_steps: int | None, seconds: float | None
    ) -> list[ExperienceBatch]:
        """Return the batches of the next update of ``run``; none when it is time to end."""
        pool = self._usable()
        if not await self._wait_for_steps(pool, min_steps, seconds):
            return []
        pool.raise_failure()
        return [] if self._is_over(pool) else pool.flow.take(min_steps)

    async def _wait_for_steps(self, pool: Pool, steps: int | None, timeout: float | None) -> bool:
        """Return whether the steps, or the end of the pool, came in time."""
        try:
            async with asyncio.timeout(timeout):
                await pool.flow.wait_for(steps, lambda: self._is_over(pool))
        except TimeoutError:
            return False
        return True

    # weights

    async def push_weights(
        self,
        weights: HasStateDict | Mapping[str, torch.Tensor],
        *,
        wait: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Publish weights to all workers and return their version, 1 for the first.

        They are copied once into shared memory, whatever the number of workers; each worker takes
        the newest version before its next experience. In sync mode a round that is being
        collected is waited for, and none begins meanwhile. When cancelled, the version is either
        published or not.

        Args:
            weights: A module, or a state dict with dense tensors on any device; copied.
            wait: Also wait until every live worker has applied this version or a newer one.
            timeout: Seconds for ``wait``; ``None`` takes ``command_timeout``.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights; the
                message names them. Nothing was published.
            PoisonedWeights: An earlier version killed its workers and was withdrawn; raised
                once, and nothing was published.
            CommandTimeout: A worker has not applied them in time; they are published.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        pool.raise_poisoned()
        tensors = tensors_of(weights)
        await pool.flow.hold_rounds(lambda: self._is_over(pool))
        try:
            version = self._publish_at_once(pool, tensors)
            if version is None:
                version = await to_completion(self._publish_weights(pool, tensors))
        finally:
            pool.flow.release_rounds()
        if wait:
            pool.expect_progress()
            await pool.communicator.wait_applied(version, list(pool.ready), timeout)
            pool.raise_poisoned()
        else:
            await anyio.lowlevel.checkpoint()  # who pushes in a loop must let the event loop turn
        return version

    def _publish_at_once(self, pool: Pool, tensors: dict[str, torch.Tensor]) -> int | None:
        if self.config.check_finite:
            return None
        version = pool.communicator.publish_at_once(tensors)
        if version is not None:
            self._count_push(pool, version, is_finite=True)
        return version

    async def _publish_weights(self, pool: Pool, tensors: dict[str, torch.Tensor]) -> int:
        """Publish and count: both or none, so it must not be cancelled between the two."""
        is_finite = True
        if self.config.check_finite:
            is_finite = await asyncio.to_thread(_is_finite, tensors)
        version = await pool.communicator.send_model_weights(tensors)
        self._count_push(pool, version, is_finite=is_finite)
        pool.expect_progress()  # where to find weights is told, so they are loaded now
        return version

    def _count_push(self, pool: Pool, version: int, *, is_finite: bool) -> None:
        num_bytes = pool.communicator.weights_nbytes
        self._num_pushes += 1
        self._bytes_pushed += num_bytes
        self._num_not_finite += not is_finite
        pool.flow.pushed()
        self._publish(WeightsPushed(version, num_bytes))

    @property
    def weights_version(self) -> int:
        """The newest weights version; 0 is none."""
        return self._pool.communicator.weights_version if self._pool is not None else 0

    # commands

    async def send_command(
        self,
        command: str,
        data: Any = None,
        *,
        worker_ids: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> dict[int, Any]:
        """Have workers handle a command and return their replies by worker id.

        It is handled between two experiences, or beside one when ``collect`` is a coroutine, at
        most once. Safe to cancel: the workers still handle it, their replies are dropped.

        Args:
            command: The name that ``on_command`` gets; "reset" calls ``reset``.
            data: Picklable; tensors are copied.
            worker_ids: Whom to ask; ``None`` asks every worker that is ready.
            timeout: Seconds; ``None`` takes ``command_timeout``.

        Raises:
            SerializationError: ``data`` cannot be pickled; nothing was sent.
            CommandError: A worker answered with an error. This error and the next two carry
                ``replies`` and ``errors`` of all workers.
            WorkerLost: A worker died before it answered, or is not ready.
            CommandTimeout: A worker did not answer in time.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        chosen = sorted(pool.ready) if worker_ids is None else list(dict.fromkeys(worker_ids))
        for worker_id in chosen:
            if worker_id not in pool.ready:
                raise WorkerLost(f"worker {worker_id} is not ready now", worker_id)
            pool.supervisor.expect_progress(worker_id)
        return await pool.communicator.send_control_command(command, data, chosen, timeout)

    async def pause(self, timeout: float | None = None) -> None:
        """Return when every worker stands still; nothing is collected until ``resume``.

        Experiences that were being collected are finished first; all that workers have delivered
        is queued here when this returns. Commands and weights are still handled. When cancelled,
        or on an error, the pool is pausing all the same; ``resume`` ends it.

        Args:
            timeout: Seconds; ``None`` takes ``command_timeout``.

        Raises:
            CommandTimeout: A worker did not come to rest in time.
            ManagerStateError: The manager is not running.
        """
        await self._usable().pause(timeout)
        self._publish(PoolPaused())

    async def resume(self) -> None:
        """Let workers collect again.

        Raises:
            ManagerStateError: The manager is not running.
        """
        self._usable().resume()
        self._publish(PoolResumed())

    async def reset(self, timeout: float | None = None) -> None:
        """Call ``reset`` of every worker; errors as in ``send_command``.

        Batches that were collected before stay queued.
        """
        await self.send_command("reset", timeout=timeout)

    # size

    async def scale(self, num_workers: int) -> None:
        """Change the number of slots, and return when all are ready or gone.

        Slots are added and removed at the upper end. A worker that is removed finishes the
        experience that it is collecting; what it has delivered stays queued. When cancelled, the
        change goes on by itself.

        Raises:
            ValueError: ``num_workers`` is not positive.
            PoolExhausted: The restart policy was exceeded.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; a pool needs at least one worker")
        await pool.resize(num_workers)
        if pool.num_workers == num_workers:
            self._publish(PoolScaled(num_workers))

    # what it knows

    def stats(self) -> PoolStats:
        """Return the pool in numbers; costs no system call. Also after the end."""
        pool = self._started(any_loop=True)
        incidents = pool.supervisor.incidents
        return PoolStats(
            seconds=time.monotonic() - self._started_at,
            num_workers=pool.num_workers,
            num_ready=len(pool.ready),
            num_batches=pool.flow.num_batches,
            num_steps=pool.flow.num_steps,
            num_queued=pool.flow.num_queued,
            num_dropped=pool.flow.num_dropped,
            num_lost=sum(incident.experiences_lost for incident in incidents),
            num_restarts=pool.supervisor.num_restarts,
            num_incidents=len(incidents),
            weights_version=pool.communicator.weights_version,
            num_pushes=self._num_pushes,
            bytes_pushed=self._bytes_pushed,
            num_not_finite=self._num_not_finite,
            seed=pool.seed,
            is_paused=pool.is_paused,
        )

    def queue_info(self) -> QueueInfo:
        """Return how many frames wait in each worker's queues."""
        pool = self._started()
        return pool.communicator.get_queue_info(pool.flow.num_queued_of)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """Every slot, by worker id."""
        return self._pool.workers() if self._pool is not None else ()

    @property
    def incidents(self) -> Sequence[Incident]:
        """Every failure so far, oldest first."""
        return tuple(self._pool.supervisor.incidents) if self._pool is not None else ()

    @property
    def is_healthy(self) -> bool:
        """Whether the pool is running and every wanted slot has a ready worker."""
        pool = self._pool
        return (
            pool is not None
            and self._state is _State.RUNNING
            and len(pool.ready) == pool.num_workers
        )

    def events(self) -> EventStream:
        """Iterate over events from now on: ``async for event in manager.events()``.

        May be called before the start. Ends when the pool has stopped. A reader that is too slow
        loses the oldest events.
        """
        stream = EventStream(self._streams)
        if self._state is _State.STOPPED:
            stream.close()
        return stream

    def add_observer(self, observer: Observer) -> None:
        """Pass events on to ``observer`` too, from the next one on.

        Raises:
            TypeError: It has no ``on_event``.
        """
        self._observers.add(observer)

    def publish_update(self, event: UpdateCompleted) -> None:
        """Tell observers and event streams that an update of ``run`` was completed."""
        self._publish(event)

    def _publish(self, event: Event) -> None:
        if isinstance(event, PoolEscalated):
            self._over.set()
        for stream in list(self._streams):
            stream.push(event)
        self._observers.on_event(event)

    # the whole life

    async def run(
        self,
        *,
        max_steps: int | None = None,
        max_seconds: float | None = None,
        steps_per_update: int | None = None,
    ) -> RunReport:
        """Start, let the learner learn until a limit or ``request_stop``, and stop.

        A pool that is running already is left running at the end. When cancelled, the update
        being learned is finished, every worker is ended, and the cancellation goes on.

        The wait for the learner is bounded. After a cancellation it is ``shutdown_timeout``; a
        second cancellation shortens the rest to two seconds. After ``request_stop``, ``stop`` or
        ``max_seconds`` it is ``shutdown_timeout`` or twice the longest update so far, whichever is
        longer. Then the learner's thread is abandoned, and the error holds its stack: a
        cancellation as a note, any other end as ``LearnerTimeout``.

        Args:
            max_steps: End after the update that brings the environment steps to this number.
            max_seconds: End after this time, with the update that is being learned then.
            steps_per_update: Gather at least this many steps for each ``learn``; ``None`` takes
                one round in sync mode, and whatever is here in async mode.

        Returns:
            What was done, incidents included.

        Raises:
            ManagerStateError: There is no learner, or the manager has served.
            WorkerStartError: A worker's first start failed.
            PoolExhausted: The restart policy was exceeded.
            LearnerTimeout: The learner did not return in time when the run should end.
            BaseException: Whatever the learner raised, as told in ``Learner``; the workers are
                gone then.
        """
        if self._learner is None:
            raise ManagerStateError(
                "run() needs a learner: ParallelManager(worker, learner=...); without one use "
                "'async with manager' and experiences() or collect()"
            )
        loop = TrainingLoop(
            self,
            self._learner,
            max_steps=max_steps,
            max_seconds=max_seconds,
            steps_per_update=steps_per_update,
        )
        if self._state is _State.RUNNING:
            return await loop.run()
        async with self:
            return await loop.run()

    # states

    def _started(self, *, any_loop: bool = False) -> Pool:
        """Return the pool of a manager that was started, in the loop that started it."""
        if self._pool is None:
            raise ManagerStateError(
                "this manager is not started; use 'async with manager', 'await manager.start()' "
                "or 'await manager.run()'"
            )
        if not any_loop and self._loop is not asyncio.get_running_loop():
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

    def _is_over(self, pool: Pool) -> bool:
        return self._stop_requested or pool.supervisor.failure is not None


async def _outcome(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    task.result()


def _is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors.values()
        if tensor.is_floating_point() or tensor.is_complex()
    )
