"""ParallelManager: the pool of workers as an application sees it."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from keisei import events
from keisei.backends.base import Backend
from keisei.backends.inline import InlineBackend
from keisei.backends.local import LocalBackend
from keisei.config import ParallelConfig
from keisei.devices import resolve_devices
from keisei.events import ExitCause, Incident
from keisei.exceptions import (
    CollectTimeout,
    ManagerStateError,
    PoisonedWeights,
    QueueEnded,
    QueueWouldBlock,
    WorkerLost,
)
from keisei.ipc import messages
from keisei.ipc.status import StatusLine
from keisei.ipc.weights import HasStateDict, tensors_of
from keisei.observers import Observer, ObserverSet
from keisei.supervision.exits import LastWords
from keisei.supervision.process import ProcessHandle
from keisei.supervision.shutdown import to_completion
from keisei.supervision.supervisor import Supervisor
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.channel import Arrival, Channel, Listener
from keisei.training.parallel.communication import QueueInfo, WorkerCommunicator
from keisei.training.parallel.factory import pickle_factory
from keisei.training.parallel.flow import Flow
from keisei.training.parallel.run import Learner, RunReport, TrainingLoop
from keisei.training.parallel.seeds import draw_root, worker_seed
from keisei.training.parallel.stats import PoolStats, WorkerInfo
from keisei.training.parallel.streams import EventStream, ExperienceStream
from keisei.worker import Worker


class _State(enum.StrEnum):
    NEW = "not started"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


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
    ) -> None:
        """Describe a pool; nothing is started yet.

        Args:
            worker: A picklable callable without arguments that returns a ``Worker``: a class of
                a module, or a ``functools.partial`` of one. Called once in each process.
            model: Its state dict is weights version 1.
            learner: For ``run``.
            config: A ``ParallelConfig``, or a mapping that validates to one.
            observers: Objects with ``on_event(event)``, called for every event.

        Raises:
            ConfigurationError: The configuration cannot work; every problem is listed.
            SerializationError: ``worker`` cannot be sent to a process.
        """
        self.config = ParallelConfig.of(config)
        self._factory = pickle_factory(worker)
        self._model = model
        self._learner = learner
        self._observers = ObserverSet(observers)
        self._seed = self.config.seed if self.config.seed is not None else draw_root()
        self._state = _State.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_workers = self.config.num_workers
        self._devices: tuple[str, ...] = ()
        self._ready: dict[int, Channel] = {}
        self._streams: set[EventStream] = set()
        self._stopping: asyncio.Task[None] | None = None
        self._stop_requested = False
        self._paused = False
        self._poisoned: PoisonedWeights | None = None
        self._started_at = 0.0
        self._num_pushes = self._bytes_pushed = self._num_not_finite = 0
        self._communicator: WorkerCommunicator
        self._supervisor: Supervisor
        self._flow: Flow
        self._backend: Backend

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
            ManagerStateError: It was started before.
        """
        if self._state is not _State.NEW:
            raise ManagerStateError(
                f"this manager is {self._state}; it serves once, so make a new one"
            )
        self._open()
        try:
            await self._backend.open()
            if self._model is not None:
                await self._communicator.send_model_weights(self._model)
            for worker_id in range(self._num_workers):
                self._supervisor.add(worker_id)
            await self._supervisor.wait_settled()
        except BaseException:
            await self.stop()
            raise
        if self._state is _State.STARTING:
            self._state = _State.RUNNING
            self._publish(events.PoolStarted(self._num_workers))

    def _open(self) -> None:
        config = self.config
        self._loop = asyncio.get_running_loop()
        self._state = _State.STARTING
        self._started_at = time.monotonic()
        self._devices = self._resolve_devices(self._num_workers)
        self._communicator = WorkerCommunicator(
            0, max_queue_size=config.max_queue_size, timeout=config.command_timeout
        )
        self._communicator.use(Listener(self._on_arrival, self._on_ready, self._on_trouble))
        if config.backend == "inline":
            self._backend = InlineBackend()
        else:
            self._backend = LocalBackend(
                self._factory,
                start_method=config.start_method,
                preload=config.preload,
                max_concurrent_starts=config.restart.max_concurrent_starts,
            )
        self._supervisor = Supervisor(_Crew(self), config, self._publish)
        self._flow = Flow(
            config,
            self._ready,
            lambda: self._communicator.weights_version,
            self._supervisor.expect_progress,
        )

    def _resolve_devices(self, num_workers: int) -> tuple[str, ...]:
        wanted = self.config.worker_device_map
        return resolve_devices(
            wanted,
            num_workers=num_workers,
            num_gpus=torch.cuda.device_count() if wanted == "auto" else 0,
            max_workers_per_gpu=self.config.max_workers_per_gpu,
        )

    async def stop(self) -> None:
        """End every worker and return when all are gone.

        Workers finish the experience that they are collecting and tear down, within
        ``shutdown_timeout``; then SIGTERM and SIGKILL follow. May be called at any time, from
        several tasks, and again: a second call shortens the grace. It is carried to its end
        even if the caller is cancelled.
        """
        if self._state is _State.NEW:
            self._state = _State.STOPPED
            return
        self._check_loop()
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(), name="keisei-stop")
        elif not self._stopping.done():
            self._supervisor.hurry()
        await to_completion(_outcome(self._stopping))

    async def _stop(self) -> None:
        self._state = _State.STOPPING
        self._stop_requested = True
        self._flow.wake()
        await self._supervisor.stop()
        self._flow.discard_all()
        await self._communicator.cleanup()
        await self._backend.aclose()
        self._state = _State.STOPPED
        self._flow.wake()
        self._publish(events.PoolStopped(len(self._supervisor.incidents)))
        for stream in list(self._streams):
            stream.close()

    def request_stop(self) -> None:
        """Have ``run()`` and ``experiences()`` end in an orderly way, soon.

        Returns at once. Call it in the manager's event loop, from a signal handler of the
        application for example; from another thread with ``loop.call_soon_threadsafe``.
        """
        self._stop_requested = True
        if self._state is not _State.NEW:
            self._flow.wake()

    @property
    def is_stop_requested(self) -> bool:
        """Whether ``request_stop`` or ``stop`` was called."""
        return self._stop_requested

    # experience

    def experiences(self) -> ExperienceStream:
        """Iterate over batches: ``async for batch in manager.experiences()``.

        Ends after ``request_stop`` or ``stop``. In sync mode a round is collected when the
        batches of the one before have been taken. Several iterators share the batches. Safe to
        cancel and to break out of: no batch is lost.

        Raises:
            PoolExhausted: The restart policy was exceeded.
        """
        self._check_usable()
        return ExperienceStream(self._next_batch)

    async def _next_batch(self) -> ExperienceBatch | None:
        self._check_loop()
        while not self._is_over():
            batch = self._flow.take_one()
            if batch is not None:
                return batch
            await self._flow.wait_for(1, self._is_over)
        self._raise_failure()
        return None

    async def collect(
        self, min_steps: int | None = None, timeout: float | None = None
    ) -> list[ExperienceBatch]:
        """Return batches with at least ``min_steps`` environment steps together.

        Safe to cancel, and to call again after a timeout: what had arrived stays queued.

        Args:
            min_steps: In async mode ``None`` returns what is here, at least one batch. In sync
                mode it returns one round, ordered by worker; otherwise as many whole rounds as
                needed.
            timeout: Seconds; ``None`` waits without end.

        Raises:
            CollectTimeout: Too little arrived in time.
            PoolExhausted: The restart policy was exceeded.
            ManagerStateError: The manager is not running.
        """
        self._check_usable()
        wanted = 1 if min_steps is None else min_steps
        try:
            async with asyncio.timeout(timeout):
                await self._flow.wait_for(wanted, self._is_over)
        except TimeoutError:
            raise CollectTimeout(
                f"{self._flow.num_steps_queued} of {wanted} steps arrived within {timeout} s; "
                f"{self._describe_workers()}"
            ) from None
        self._raise_failure()
        if self._state is not _State.RUNNING:
            self._check_usable()
        return self._flow.take(None if self.config.mode == "sync" else min_steps)

    async def _next_update(
        self, steps: int | None, seconds: float | None
    ) -> list[ExperienceBatch]:
        """Return the batches of the next update of ``run``; none if the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._flow.wait_for(steps or 1, self._is_over)
        except TimeoutError:
            return []
        self._raise_failure()
        return [] if self._is_over() else self._flow.take(steps)

    def _describe_workers(self) -> str:
        return ", ".join(
            f"worker {info.worker_id} is {info.state} ({info.phase})" for info in self.workers
        )

    # weights

    async def push_weights(
        self,
        weights: HasStateDict | Mapping[str, torch.Tensor],
        *,
        wait: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Publish weights to all workers and return their version: 1, 2, 3 …

        They are copied once into shared memory, whatever the number of workers; each worker takes
        the newest version before its next experience. In sync mode a round that is being
        collected is waited for. When cancelled, the version is either published or not.

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
        self._check_usable()
        self._raise_poisoned()
        tensors = tensors_of(weights)
        if self.config.mode == "sync":
            await self._flow.wait_round_over(self._is_over)
        version = await self._communicator.send_model_weights(tensors)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._num_pushes += 1
        self._bytes_pushed += num_bytes
        if self.config.check_finite and not await asyncio.to_thread(_is_finite, tensors):
            self._num_not_finite += 1
        self._flow.pushed()
        self._publish(events.WeightsPushed(version, num_bytes))
        if wait:
            for worker_id in self._ready:
                self._supervisor.expect_progress(worker_id)
            await self._communicator.wait_applied(version, list(self._ready), timeout)
            self._raise_poisoned()
        return version

    def _raise_poisoned(self) -> None:
        poisoned, self._poisoned = self._poisoned, None
        if poisoned is not None:
            raise poisoned

    @property
    def weights_version(self) -> int:
        """The newest weights version; 0 is none."""
        return self._communicator.weights_version if self._state is not _State.NEW else 0

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
        self._check_usable()
        chosen = sorted(self._ready) if worker_ids is None else list(worker_ids)
        for worker_id in chosen:
            if worker_id not in self._ready:
                raise WorkerLost(f"worker {worker_id} is not ready now", worker_id)
        for worker_id in chosen:
            self._loop_soon(self._supervisor.expect_progress, worker_id)
        return await self._communicator.send_control_command(command, data, chosen, timeout)

    def _loop_soon(self, callback: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        self._loop.call_soon(callback, *args)

    async def pause(self, timeout: float | None = None) -> None:
        """Return when every worker stands still; nothing is collected until ``resume``.

        Experiences that were being collected are finished and delivered as usual. Commands and
        weights are still handled. When cancelled, or on an error, the pool is pausing all the
        same; ``resume`` ends it.

        Args:
            timeout: Seconds; ``None`` takes ``command_timeout``.

        Raises:
            CommandTimeout: A worker did not come to rest in time.
            ManagerStateError: The manager is not running.
        """
        self._check_usable()
        self._paused = True
        moving = [key for key, channel in self._ready.items() if not channel.is_paused]
        try:
            await self._communicator.pause(moving, timeout)
        except WorkerLost as lost:
            others = [error for error in lost.errors.values() if not isinstance(error, WorkerLost)]
            if others:
                raise others[0] from None  # the dead stand still; a time-out is one all the same
        if not self._paused:
            return
        for worker_id in moving:
            if worker_id in self._ready:
                self._ready[worker_id].is_paused = True
        self._publish(events.PoolPaused())

    async def resume(self) -> None:
        """Let workers collect again.

        Raises:
            ManagerStateError: The manager is not running.
        """
        self._check_usable()
        self._paused = False
        for worker_id, channel in self._ready.items():
            channel.is_paused = False
            self._send(channel, messages.Resume())
            self._supervisor.expect_progress(worker_id)
        self._publish(events.PoolResumed())

    async def reset(self, timeout: float | None = None) -> None:
        """Call ``reset`` of every worker; errors as in ``send_command``.

        Batches that were collected before stay queued.
        """
        await self.send_command("reset", timeout=timeout)

    @staticmethod
    def _send(channel: Channel, message: Any) -> bool:
        try:
            channel.send(message)
        except (QueueWouldBlock, QueueEnded):
            return False
        return True

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
        self._check_usable()
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; a pool needs at least one worker")
        before, self._num_workers = self._num_workers, num_workers
        self._devices = self._resolve_devices(num_workers)
        for worker_id in range(before, num_workers):
            self._supervisor.add(worker_id)
        for worker_id in range(num_workers, before):
            self._ready.pop(worker_id, None)
            self._supervisor.remove(worker_id)
        await self._supervisor.wait_settled()
        if self._num_workers == num_workers:
            self._publish(events.PoolScaled(num_workers))

    # what it knows

    def stats(self) -> PoolStats:
        """Return the pool in numbers; costs no system call. Also after the end."""
        self._check_started()
        incidents = self._supervisor.incidents
        return PoolStats(
            seconds=time.monotonic() - self._started_at,
            num_workers=self._num_workers,
            num_ready=len(self._ready),
            num_batches=self._flow.num_batches,
            num_steps=self._flow.num_steps,
            num_queued=self._flow.num_queued,
            num_dropped=self._flow.num_dropped,
            num_lost=sum(incident.experiences_lost for incident in incidents),
            num_restarts=self._supervisor.num_restarts,
            num_incidents=len(incidents),
            weights_version=self._communicator.weights_version,
            num_pushes=self._num_pushes,
            bytes_pushed=self._bytes_pushed,
            num_not_finite=self._num_not_finite,
            seed=self._seed,
            is_paused=self._paused,
        )

    def queue_info(self) -> QueueInfo:
        """Return how many frames wait in each worker's queues."""
        self._check_started()
        info = self._communicator.get_queue_info()
        queued = tuple(self._flow.num_queued_of(key) for key in sorted(self._communicator.channels))
        return QueueInfo(
            num_workers=info.num_workers,
            max_queue_size=info.max_queue_size,
            experience_queue_sizes=queued,
            model_queue_sizes=info.model_queue_sizes,
            control_queue_sizes=info.control_queue_sizes,
        )

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """Every slot, by worker id."""
        if self._state is _State.NEW:
            return ()
        return tuple(
            self._worker_info(worker_id)
            for worker_id in sorted(self._supervisor.slots)
            if worker_id < self._num_workers or not self._supervisor.is_closed(worker_id)
        )

    def _worker_info(self, worker_id: int) -> WorkerInfo:
        slot = self._supervisor.slots[worker_id]
        running = self._supervisor.running(worker_id)
        channel = self._communicator.channels.get(worker_id)
        has_process = running is not None and running.handle is not None and channel is not None
        status = channel.status if has_process and channel is not None else None
        return WorkerInfo(
            worker_id=worker_id,
            incarnation=slot.incarnation,
            pid=running.handle.pid if running is not None and running.handle is not None else None,
            state=slot.status.value,
            phase=status.phase.name.lower() if status is not None else "",
            device=self._devices[min(worker_id, len(self._devices) - 1)],
            weights_version=status.version if status is not None else 0,
            experiences=status.committed if status is not None else 0,
            num_failures=len(slot.failures),
        )

    @property
    def incidents(self) -> Sequence[Incident]:
        """Every failure so far, oldest first."""
        return tuple(self._supervisor.incidents) if self._state is not _State.NEW else ()

    @property
    def is_healthy(self) -> bool:
        """Whether the pool is running and every wanted slot has a ready worker."""
        return self._state is _State.RUNNING and len(self._ready) == self._num_workers

    def events(self) -> EventStream:
        """Iterate over events from now on: ``async for event in manager.events()``.

        May be called before the start. Ends when the pool has stopped. A reader that is too slow
        loses the oldest events.
        """
        stream = EventStream(self._streams)
        if self._state is _State.STOPPED:
            stream.close()
        return stream

    def _publish(self, event: events.Event) -> None:
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

        Args:
            max_steps: End after the update that brings the environment steps to this number.
            max_seconds: End after this time, checked between updates.
            steps_per_update: Gather at least this many steps for each ``learn``; ``None`` takes
                one round in sync mode, and whatever is here in async mode.

        Returns:
            What was done, incidents included.

        Raises:
            ManagerStateError: There is no learner, or the manager has served.
            WorkerStartError: A worker's first start failed.
            PoolExhausted: The restart policy was exceeded.
            Exception: Whatever the learner raised; the workers are gone then.
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

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise ManagerStateError(
                "this manager belongs to another event loop; use it in the loop that started it "
                "(asyncio.run_coroutine_threadsafe from other threads)"
            )

    def _check_started(self) -> None:
        if self._state is _State.NEW or self._loop is None:
            raise ManagerStateError(
                "this manager is not started; use 'async with manager', 'await manager.start()' "
                "or 'await manager.run()'"
            )

    def _check_usable(self) -> None:
        self._check_started()
        self._check_loop()
        self._raise_failure()
        if self._state not in (_State.RUNNING, _State.STARTING):
            raise ManagerStateError(f"this manager is {self._state}; make a new one")

    def _is_over(self) -> bool:
        return self._stop_requested or self._supervisor.failure is not None

    def _raise_failure(self) -> None:
        if self._state is not _State.NEW and self._supervisor.failure is not None:
            raise self._supervisor.failure

    # what workers say

    def _on_arrival(self, arrival: Arrival) -> None:
        self._flow.arrived(arrival)

    def _on_ready(self, channel: Channel) -> None:
        worker_id = channel.worker_id
        self._supervisor.readied(worker_id, channel.incarnation)
        if self._supervisor.is_ready(worker_id):
            self._ready[worker_id] = channel
            channel.is_paused = self._paused
            self._flow.became_ready(channel)

    def _on_trouble(self, channel: Channel, what: str, may_be_dying: bool) -> None:
        if may_be_dying:
            self._supervisor.doubt(channel.worker_id, what)
        else:
            self._supervisor.condemn(channel.worker_id, ExitCause.PROTOCOL, what)


class _Crew:
    """What the supervisor asks of the manager."""

    def __init__(self, manager: ParallelManager) -> None:
        self._manager = manager

    async def launch(self, worker_id: int, incarnation: int) -> ProcessHandle:
        manager, config = self._manager, self._manager.config
        communicator = manager._communicator
        channel = communicator.renew(worker_id)
        channel.incarnation = incarnation
        endpoints = communicator.endpoints(worker_id)
        channel.send(
            messages.Hello(
                factory=manager._factory,
                worker_id=worker_id,
                incarnation=incarnation,
                num_workers=manager._num_workers,
                seed=worker_seed(manager._seed, worker_id, incarnation),
                device=manager._devices[worker_id],
                weights_version=communicator.weights_version,
                threads=config.threads_per_worker,
                slots=config.max_queue_size,
                paused=manager._paused,
                max_experiences=config.max_experiences_per_worker,
                max_rss=config.max_worker_rss,
            )
        )
        try:
            return await manager._backend.start(endpoints, f"keisei-worker-{worker_id}")
        finally:
            if config.backend != "inline":
                endpoints.close()

    def abort_launch(self) -> None:
        self._manager._backend.abort_starts()

    def status(self, worker_id: int) -> StatusLine:
        return self._manager._communicator.channels[worker_id].status

    def owes(self, worker_id: int) -> bool:
        return self._manager._communicator.channels[worker_id].owes

    def ask_to_stop(self, worker_id: int) -> bool:
        channel = self._manager._communicator.channels[worker_id]
        return self._manager._send(channel, messages.Stop())

    def read_last_words(self, worker_id: int) -> LastWords:
        manager = self._manager
        manager._ready.pop(worker_id, None)
        channel = manager._communicator.channels.get(worker_id)
        return channel.read_last_words() if channel is not None else LastWords()

    def withdraw_weights(self, version: int, incident: Incident) -> None:
        manager = self._manager
        if manager.weights_version != version:
            return  # the publisher has pushed better ones already
        replacement = manager._communicator.revert_weights()
        manager._poisoned = PoisonedWeights(
            f"weights version {version} was withdrawn after the workers that applied it failed; "
            f"version {replacement} holds the previous weights again; last: {incident.summary}",
            version,
            replacement,
        )
        manager._flow.pushed()

    def on_lost(self, worker_id: int, incident: Incident | None) -> None:
        manager = self._manager
        channel = manager._communicator.channels.get(worker_id)
        if channel is not None:
            what = incident.summary if incident is not None else "it has ended"
            exitcode = incident.exitcode if incident is not None else 0
            trace = incident.traceback if incident is not None else None
            channel.lose(
                WorkerLost(
                    f"worker {worker_id} was lost: {what}",
                    worker_id,
                    channel.incarnation,
                    exitcode,
                    trace,
                )
            )

    def on_escalated(self, error: Exception) -> None:
        self._manager._flow.wake()

    def on_slot_closed(self, worker_id: int) -> None:
        manager = self._manager
        manager._communicator.remove(worker_id)
        manager._flow.closed(worker_id)


async def _outcome(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    task.result()


def _is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors.values()
        if tensor.is_floating_point() or tensor.is_complex()
    )
