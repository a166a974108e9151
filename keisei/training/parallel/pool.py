"""The parts of one manager's pool, put together: what supervision asks of it is answered here.

``ParallelManager`` is what an application talks to; this is what it talks about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from keisei.backends.base import Backend
from keisei.backends.inline import InlineBackend
from keisei.backends.local import LocalBackend
from keisei.config import ParallelConfig
from keisei.devices import resolve_devices
from keisei.events import Event, Incident, WeightsPushed
from keisei.exceptions import WorkerLost
from keisei.protocol import messages
from keisei.protocol.line import Line
from keisei.supervision.process import ProcessHandle
from keisei.supervision.supervisor import Supervisor
from keisei.training.parallel.communication import WorkerCommunicator
from keisei.training.parallel.flow import Flow
from keisei.training.parallel.model_sync import ModelSynchronizer
from keisei.training.parallel.seeds import worker_seed
from keisei.training.parallel.settings import SettingsBook, SettingsTeller
from keisei.training.parallel.stats import WorkerInfo
from keisei.worker import MAIN


class Pool:
    """Supervisor, flow, weights and backend of one manager, in its event loop.

    Attributes:
        supervisor: Keeps the slots filled; owns every process with its line.
        synchronizer: Owns the weights.
        communicator: Sends commands over the lines.
        settings: Keeps what each slot is set to, and tells the workers.
        flow: The credits and the inbox.
        backend: Starts processes.
        num_workers: Slots that are wanted.
        is_paused: Whether workers are to stand still.
        is_closed: ``close_now`` was called.
        over: Set when the pool has failed for good, or a stop was requested.
        seed: The root of all seeds.
    """

    def __init__(
        self,
        config: ParallelConfig,
        factory: bytes,
        seed: int,
        publish: Callable[[Event], None],
        backend: Backend | None,
        settings: SettingsBook,
    ) -> None:
        self.config = config
        self.seed = seed
        self.num_workers = config.num_workers
        self.is_paused = False
        self.is_closed = False
        self.over = asyncio.Event()
        self._factory = factory
        self._publish = publish
        self._devices = self._resolve_devices()
        self.backend = backend or self._make_backend()
        self.supervisor = Supervisor(self, config, publish)
        self.ready = self.supervisor.ready
        self.synchronizer = ModelSynchronizer(
            config.sync_interval,
            config.compression_enabled,
            check_finite=config.check_finite,
            lines=self.supervisor.lines,
            on_pushed=self._on_pushed,
        )
        self.communicator = WorkerCommunicator(
            0,
            max_queue_size=config.max_queue_size,
            timeout=config.command_timeout,
            lines=self.supervisor.lines,
            synchronizer=self.synchronizer,
        )
        self.settings = SettingsTeller(settings, self.supervisor.lines, publish)
        self.flow = Flow(config, self.ready, self.synchronizer.newest_version)
        self.on_batch = self.flow.arrived

    def _make_backend(self) -> Backend:
        if self.config.backend == "inline":
            return InlineBackend()
        return LocalBackend(
            self._factory,
            start_method=self.config.start_method,
            preload=self.config.preload,
            max_concurrent_starts=self.config.restart.max_concurrent_starts,
        )

    def _resolve_devices(self) -> tuple[str, ...]:
        wanted = self.config.worker_device_map
        return resolve_devices(
            wanted,
            num_workers=self.num_workers,
            num_gpus=torch.cuda.device_count() if wanted == "auto" else 0,
            max_workers_per_gpu=self.config.max_workers_per_gpu,
        )

    # what the manager asks

    async def close(self) -> None:
        """End every worker, then give everything back."""
        self.flow.wake()
        try:
            await self.supervisor.stop()
        finally:
            self.flow.discard_all()
            self.flow.wake()
            self.synchronizer.close()
            await self.backend.aclose()

    def close_now(self) -> None:
        """Kill every worker and give everything back at once, without an event loop."""
        self.is_closed = True
        self.supervisor.kill_all()
        self.flow.discard_all()
        self.synchronizer.close()
        close = getattr(self.backend, "close", None)
        if close is not None:
            close()

    async def fill(self) -> None:
        """Start a worker in every slot; return when all are ready."""
        for worker_id in range(self.num_workers):
            self.supervisor.add(worker_id)
        await self.supervisor.wait_settled()

    async def resize(self, num_workers: int) -> None:
        """Add or remove slots at the upper end; return when all are ready or gone.

        Raises:
            Exception: Whatever the function of the settings raises for a new slot; nothing has
                changed then.
        """
        self.settings.book.add(range(num_workers))
        before, self.num_workers = self.num_workers, num_workers
        self._devices = self._resolve_devices()
        for worker_id in range(before, num_workers):
            self.supervisor.add(worker_id)
        for worker_id in range(num_workers, before):
            self.supervisor.remove(worker_id)
        await self.supervisor.wait_settled()

    async def restart(self, worker_id: int) -> None:
        """Replace the process of a slot; return when the new one is ready."""
        slots = self.supervisor
        before = slots.slots[worker_id].incarnation
        slots.restart(worker_id)
        await slots.wait_until(
            lambda: (
                slots.is_settled(worker_id)
                and (slots.slots[worker_id].incarnation > before or slots.is_closed(worker_id))
            )
        )
        if slots.is_closed(worker_id):
            status = slots.slots[worker_id].status
            why = f"worker {worker_id} was not restarted: its slot is {status} now"
            raise WorkerLost(why, worker_id, slots.slots[worker_id].incarnation)

    def known(self, worker_ids: Iterable[int]) -> frozenset[int]:
        """Return those worker ids as a set.

        Raises:
            ValueError: A slot of them is not there, or was given up.
        """
        chosen = frozenset(worker_ids)
        there = {
            worker_id
            for worker_id in self.supervisor.slots
            if worker_id < self.num_workers and not self.supervisor.is_closed(worker_id)
        }
        if unknown := chosen - there:
            raise ValueError(f"no such worker: {sorted(unknown)}; there are {sorted(there)}")
        return chosen

    async def pause(self, timeout: float | None) -> None:
        """Return when every worker stands still; raises ``CommandTimeout``."""
        self.is_paused = True
        self.flow.wake()  # a push that waits for a round waits no longer
        lines = self.ready.now()
        try:
            await self.communicator.pause(list(lines), timeout)
        except WorkerLost as lost:
            others = [error for error in lost.errors.values() if not isinstance(error, WorkerLost)]
            if others:
                raise others[0] from None  # the dead stand still; a time-out is one all the same
        for line in lines.values():
            # The answer came by another queue than the experiences, and may have been faster.
            await line.read_arrived()

    def resume(self) -> None:
        """Let every worker collect again."""
        self.is_paused = False
        for line in self.ready.values():
            line.try_to_send(messages.Resume())

    def raise_failure(self) -> None:
        """Raise why the pool has failed for good, if it has."""
        if self.supervisor.failure is not None:
            raise self.supervisor.failure

    def workers(self) -> Iterator[WorkerInfo]:
        """Describe each slot that is wanted or still has a process, by worker id."""
        for worker_id in sorted(self.supervisor.slots):
            if worker_id < self.num_workers or not self.supervisor.is_closed(worker_id):
                yield self._worker_info(worker_id)

    def _worker_info(self, worker_id: int) -> WorkerInfo:
        slot = self.supervisor.slots[worker_id]
        running = self.supervisor.running(worker_id)
        handle = running.handle if running is not None else None
        line = running.line if running is not None else None
        status = line.status if handle is not None and line is not None else None
        now = time.monotonic()
        moved_at = status.since if status is not None else 0.0
        is_ready = self.supervisor.is_ready(worker_id)  # it may be, before its pid is known
        return WorkerInfo(
            worker_id=worker_id,
            incarnation=slot.incarnation,
            pid=handle.pid if handle is not None else None,
            state=slot.status.value if handle is not None or not is_ready else "starting",
            phase=status.phase.name.lower() if status is not None else "",
            device=self._devices[min(worker_id, len(self._devices) - 1)],
            weights_version=status.version if status is not None else 0,
            experiences=status.committed if status is not None else 0,
            num_failures=len(slot.failures),
            age=now - slot.ready_since if status is not None and slot.ready_since else 0.0,
            seconds_since_progress=max(0.0, now - moved_at) if moved_at > 0 else 0.0,
        )

    def _on_pushed(self, name: str, version: int, num_bytes: int) -> None:
        if name == MAIN:
            self.flow.pushed()
        self._publish(WeightsPushed(version, num_bytes, name))

    # what supervision asks (it is the ``PoolPort``)

    def make_line(self, worker_id: int, incarnation: int) -> Line:
        """Make the queues of a new process."""
        return Line(
            worker_id,
            incarnation,
            self.config.max_queue_size,
            self.synchronizer.newest_version,
            self.synchronizer.newest_named,
        )

    async def launch(self, line: Line) -> ProcessHandle:
        """Start a process at the other end of ``line``."""
        endpoints = line.endpoints()
        has_weights = self.synchronizer.introduce(line)
        worker_id, incarnation = line.worker_id, line.incarnation
        self.settings.greet(
            line,
            messages.Hello(
                factory=self._factory,
                worker_id=worker_id,
                incarnation=incarnation,
                num_workers=self.num_workers,
                seed=worker_seed(self.seed, worker_id, incarnation),
                device=self._devices[worker_id],
                weights_version=self.synchronizer.version,
                threads=self.config.threads_per_worker,
                cells=self.config.max_queue_size,
                # Every process begins paused: a pause that comes while it starts must hold for
                # it too.
                paused=True,
                max_experiences=self.config.max_experiences_per_worker,
                max_rss=self.config.max_worker_rss,
                has_weights=has_weights,
            ),
        )
        return await self.backend.start(endpoints, f"keisei-worker-{worker_id}.{incarnation}")

    def abort_launch(self) -> None:
        """Make a ``launch`` that takes too long fail."""
        self.backend.abort_starts()

    def on_ready(self, line: Line) -> None:
        """Called when a worker is ready: let it collect, and give it its credits."""
        if not self.is_paused:
            line.try_to_send(messages.Resume())
        self.flow.became_ready(line)

    def withdraw_weights(self, number: int, version: int, incident: Incident) -> None:
        """Put the weights before ``version`` back; the next push raises ``PoisonedWeights``."""
        self.synchronizer.withdraw(version, incident.summary, number)
        if number == 0:
            self.flow.pushed()

    def on_failed(self) -> None:
        """Called when the pool has failed for good: wake everybody who waits for experiences."""
        self.over.set()
        self.flow.wake()

    def on_cancelled(self) -> None:
        """Called when the loop ends with the pool open: give everything back."""
        self.close_now()

    def on_slot_closed(self, worker_id: int) -> None:
        """Called when a slot will have no process any more."""
        self.flow.closed(worker_id)
