"""ParallelManager: the pool of workers as an application sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from keisei.events import Event, Incident, PoolPaused, PoolResumed
from keisei.exceptions import CollectTimeout, ManagerStateError, WorkerLost
from keisei.ipc.threads import to_the_end
from keisei.naming import public
from keisei.observers import Observer
from keisei.training.parallel import html
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.communication import QueueInfo
from keisei.training.parallel.evaluation import Evaluate, Evaluation
from keisei.training.parallel.managed_weights import ManagedWeights
from keisei.training.parallel.pool import Pool
from keisei.training.parallel.run import RunReport, TrainingLoop
from keisei.training.parallel.sizing import Sizing
from keisei.training.parallel.snapshots import PreparedModel
from keisei.training.parallel.stats import PoolStats, WorkerInfo
from keisei.training.parallel.streams import EventStream, ExperienceStream


@public
class ParallelManager(Sizing, ManagedWeights):
    """Runs a pool of workers from inside an asyncio application.

    Use it as ``async with ParallelManager(...) as manager:``, or ``await manager.run()`` for the
    whole life with a learner. It belongs to the event loop that started it and serves once.
    It takes nothing global: no signal handler, no start method, no torch setting.
    """

    _training: TrainingLoop | None = None

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
        ready = pool.ready.now()
        lines = ready if worker_ids is None else {}
        for worker_id in worker_ids or ():
            if worker_id not in ready:
                raise WorkerLost(f"worker {worker_id} is not ready now", worker_id)
            lines[worker_id] = ready[worker_id]
        return await pool.communicator.command(lines, command, data, timeout)

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
        self._hub.publish(PoolPaused())

    async def resume(self) -> None:
        """Let workers collect again.

        Raises:
            ManagerStateError: The manager is not running.
        """
        self._usable().resume()
        self._hub.publish(PoolResumed())

    async def reset(self, timeout: float | None = None) -> None:
        """Call ``reset`` of every worker; errors as in ``send_command``.

        Batches that were collected before stay queued.
        """
        await self.send_command("reset", timeout=timeout)

    # what it knows

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the state, and a row for each slot."""
        stats = self.stats() if self._pool is not None else None
        return html.of_manager(self.state, stats, self.workers)

    def stats(self) -> PoolStats:
        """Return the pool in numbers; costs no system call. Also after the end."""
        pool = self._started(any_loop=True)
        incidents = pool.supervisor.incidents
        pushes = pool.synchronizer.get_sync_stats()
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
            weights_version=pool.synchronizer.version,
            num_pushes=pushes.num_pushes,
            bytes_pushed=pushes.bytes_pushed,
            num_not_finite=pushes.num_not_finite,
            seed=pool.seed,
            is_paused=pool.is_paused,
        )

    def queue_info(self) -> QueueInfo:
        """Return how many frames wait in each worker's queues."""
        pool = self._started()
        slots = [key for key in pool.supervisor.slots if not pool.supervisor.is_closed(key)]
        return pool.communicator.get_queue_info(slots, pool.flow.num_queued_of)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """Every slot, by worker id."""
        return tuple(self.iter_workers())

    def iter_workers(self) -> Iterator[WorkerInfo]:
        """Iterate over the slots by worker id; each is described as it is when it is taken.

        For large pools: describing a thousand slots takes about ten milliseconds, between which the
        event loop may turn.
        """
        return self._pool.workers() if self._pool is not None else iter(())

    @property
    def incidents(self) -> Sequence[Incident]:
        """Every failure so far, oldest first."""
        return tuple(self._pool.supervisor.incidents) if self._pool is not None else ()

    def events(self) -> EventStream:
        """Iterate over events from now on: ``async for event in manager.events()``.

        May be called before the start. Ends when the pool has stopped. A reader that is too slow
        loses the oldest events.
        """
        stream = self._hub.stream()
        if self._is_stopped:
            stream.close()
        return stream

    def add_observer(self, observer: Observer) -> None:
        """Pass events on to ``observer`` too, from the next one on.

        Raises:
            TypeError: It has no ``on_event``.
        """
        self._observers.add(observer)

    def publish_update(self, event: Event) -> None:
        """Tell observers and event streams of an update of ``run``, or of an evaluation."""
        self._hub.publish(event)

    # the whole life

    async def run(
        self,
        *,
        max_steps: int | None = None,
        max_seconds: float | None = None,
        steps_per_update: int | None = None,
        evaluate: Evaluate | Evaluation | None = None,
        evaluate_every: int | None = None,
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
            evaluate: Called beside training with a copy of the learner's weights from the end of
                an update, tensors by name on the CPU: a plain function in a thread of its own, a
                coroutine function on the event loop. The numbers that it returns become an
                ``EvaluationCompleted`` event and are in the report. An error in it ends the run
                after the update that is being learned. ``Evaluation(function, ...)`` says more.
                At the end the one that runs has as long as the learner has, and is abandoned then.
            evaluate_every: Updates between the beginnings of two evaluations, at least; ``None``
                is 1. While one runs none begins, and none waits for it.

        Returns:
            What was done, incidents included.

        Raises:
            ManagerStateError: There is no learner, or the manager has served.
            WorkerStartError: A worker's first start failed.
            PoolExhausted: The restart policy was exceeded.
            ConfigurationError: The arguments about evaluation say what cannot be.
            LearnerTimeout: The learner did not return in time when the run should end.
            BaseException: Whatever the learner or ``evaluate`` raised, as told in ``Learner``; the
                workers are gone then.
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
            evaluation=Evaluation.of(evaluate, evaluate_every),
        )
        try:
            if self._is_running:
                self._training = loop
                return await loop.run()
            async with self:
                self._training = loop
                return await loop.run()
        finally:
            self._training = None

    async def snapshot_learner(self) -> PreparedModel:
        """Return a snapshot of the learner's weights from between two updates of ``run``.

        ``learner.state_dict()`` would be read while ``learn`` changes it. An update that is being
        learned is waited for, and none begins meanwhile. ``snapshot`` takes the weights that were
        pushed last, which may be older.

        Raises:
            ManagerStateError: ``run`` is not learning, so nothing protects the learner.
            WeightsError: The weights hold something that is no dense tensor.
            LearnerTimeout: The run has ended meanwhile.
        """
        training = self._training
        if training is None:
            raise ManagerStateError(
                "run() is not learning now; take learner.state_dict() of a learner that is idle"
            )
        synchronizer = self._usable().synchronizer
        weights = await training.weights()
        return await to_the_end(lambda: synchronizer.prepare(weights))
