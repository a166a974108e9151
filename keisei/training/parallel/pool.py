"""The pool itself: what the supervisor asks of it, and the parts that make it up.

``ParallelManager`` is what an application talks to; this is what it talks about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keisei.backends.base import Backend
from keisei.backends.inline import InlineBackend
from keisei.backends.local import LocalBackend
from keisei.config import ParallelConfig
from keisei.devices import resolve_devices
from keisei.events import Event, ExitCause, Incident
from keisei.exceptions import PoisonedWeights, QueueClosed, QueueEnded, WorkerLost
from keisei.ipc.status import StatusLine
from keisei.protocol import messages
from keisei.supervision.exits import LastWords
from keisei.supervision.process import ProcessHandle
from keisei.supervision.supervisor import Supervisor
from keisei.training.parallel.channel import Channel, Listener
from keisei.training.parallel.communication import WorkerCommunicator
from keisei.training.parallel.flow import Flow
from keisei.training.parallel.seeds import worker_seed
from keisei.training.parallel.stats import WorkerInfo


class Pool:
    """Queues, flow, supervisor and backend of one manager, in its event loop.

    Attributes:
        communicator: The queues.
        flow: The credits and the inbox.
        supervisor: Keeps the slots filled.
        backend: Starts processes.
        ready: The channels of workers that are ready, by worker id.
        num_workers: Slots that are wanted.
        is_paused: Whether workers are to stand still.
        seed: The root of all seeds.
    """

    def __init__(
        self,
        config: ParallelConfig,
        factory: bytes,
        seed: int,
        publish: Callable[[Event], None],
        backend: Backend | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.num_workers = config.num_workers
        self.is_paused = False
        self.ready: dict[int, Channel] = {}
        self._factory = factory
        self._poisoned: PoisonedWeights | None = None
        self._devices = self._resolve_devices()
        self.communicator = WorkerCommunicator(
            0, max_queue_size=config.max_queue_size, timeout=config.command_timeout
        )
        self.backend = backend or self._make_backend()
        self.supervisor = Supervisor(self, config, publish)
        self.flow = Flow(
            config,
            self.ready,
            lambda: self.communicator.weights_version,
            self.supervisor.expect_progress,
        )
        self.communicator.use(Listener(self.flow.arrived, self._on_ready, self._on_trouble))

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
            await self.communicator.cleanup()
            await self.backend.aclose()

    async def fill(self) -> None:
        """Start a worker in every slot; return when all are ready."""
        for worker_id in range(self.num_workers):
            self.supervisor.add(worker_id)
        await self.supervisor.wait_settled()

    async def resize(self, num_workers: int) -> None:
        """Add or remove slots at the upper end; return when all are ready or gone."""
        before, self.num_workers = self.num_workers, num_workers
        self._devices = self._resolve_devices()
        for worker_id in range(before, num_workers):
            self.supervisor.add(worker_id)
        for worker_id in range(num_workers, before):
            self.ready.pop(worker_id, None)
            self.supervisor.remove(worker_id)
        await self.supervisor.wait_settled()

    async def pause(self, timeout: float | None) -> None:
        """Return when every worker stands still; raises ``CommandTimeout``."""
        self.is_paused = True
        for channel in self.ready.values():
            channel.is_paused = True
        try:
            await self.communicator.pause(list(self.ready), timeout)
        except WorkerLost as lost:
            others = [error for error in lost.errors.values() if not isinstance(error, WorkerLost)]
            if others:
                raise others[0] from None  # the dead stand still; a time-out is one all the same
        for channel in list(self.ready.values()):
            channel.read_arrived()  # its answer came by another queue, and may have been faster

    def resume(self) -> None:
        """Let every worker collect again."""
        self.is_paused = False
        for channel in self.ready.values():
            self._set_going(channel)

    def expect_progress(self) -> None:
        """Hear that every ready worker was given something to do."""
        for worker_id in self.ready:
            self.supervisor.expect_progress(worker_id)

    def _set_going(self, channel: Channel) -> None:
        channel.is_paused = False
        self._send(channel, messages.Resume())
        self.supervisor.expect_progress(channel.worker_id)

    @staticmethod
    def _send(channel: Channel, message: Any) -> bool:
        try:
            channel.send(message)
        except (QueueEnded, QueueClosed):
            return False
        return True

    def raise_failure(self) -> None:
        """Raise why the pool has failed for good, if it has."""
        if self.supervisor.failure is not None:
            raise self.supervisor.failure

    def raise_poisoned(self) -> None:
        """Raise, once, that a weights version was withdrawn."""
        poisoned, self._poisoned = self._poisoned, None
        if poisoned is not None:
            raise poisoned

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Describe every slot that is wanted or still has a process, by worker id."""
        return tuple(
            self._worker_info(worker_id)
            for worker_id in sorted(self.supervisor.slots)
            if worker_id < self.num_workers or not self.supervisor.is_closed(worker_id)
        )

    def _worker_info(self, worker_id: int) -> WorkerInfo:
        slot = self.supervisor.slots[worker_id]
        running = self.supervisor.running(worker_id)
        handle = running.handle if running is not None else None
        channel = self.communicator.channels.get(worker_id)
        status = channel.status if handle is not None and channel is not None else None
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
        )

    # what workers say

    def _on_ready(self, channel: Channel) -> None:
        worker_id = channel.worker_id
        self.supervisor.readied(worker_id, channel.incarnation)
        if self.supervisor.is_ready(worker_id):
            self.ready[worker_id] = channel
            if not self.is_paused:
                self._set_going(channel)
            self.flow.became_ready(channel)

    def _on_trouble(self, channel: Channel, what: str, may_be_dying: bool) -> None:
        if may_be_dying:
            self.supervisor.doubt(channel.worker_id, what)
        else:
            self.supervisor.condemn(channel.worker_id, ExitCause.PROTOCOL, what)

    # what the supervisor asks (its ``Crew``)

    async def launch(self, worker_id: int, incarnation: int) -> ProcessHandle:
        """Make fresh queues and start a process on them."""
        channel = self.communicator.renew(worker_id, incarnation)
        # Every process begins paused: a pause that comes while it starts must hold for it too.
        channel.is_paused = True
        endpoints = self.communicator.endpoints(worker_id)
        channel.send(
            messages.Hello(
                factory=self._factory,
                worker_id=worker_id,
                incarnation=incarnation,
                num_workers=self.num_workers,
                seed=worker_seed(self.seed, worker_id, incarnation),
                device=self._devices[worker_id],
                weights_version=self.communicator.weights_version,
                threads=self.config.threads_per_worker,
                slots=self.config.max_queue_size,
                paused=True,
                max_experiences=self.config.max_experiences_per_worker,
                max_rss=self.config.max_worker_rss,
            )
        )
        return await self.backend.start(endpoints, f"keisei-worker-{worker_id}.{incarnation}")

    def abort_launch(self) -> None:
        """Make a ``launch`` that takes too long fail."""
        self.backend.abort_starts()

    def status(self, worker_id: int) -> StatusLine:
        """Return the line on which the slot's process says what it is doing."""
        return self.communicator.channels[worker_id].status

    def owes(self, worker_id: int) -> bool:
        """Return whether the slot's process has been given something to do."""
        return self.communicator.channels[worker_id].owes

    def ask_to_stop(self, worker_id: int) -> bool:
        """Send the stop frame; return whether it could be sent."""
        return self._send(self.communicator.channels[worker_id], messages.Stop())

    def read_last_words(self, worker_id: int) -> LastWords:
        """Read the queues of the slot's ended process to their end."""
        self.ready.pop(worker_id, None)
        channel = self.communicator.channels.get(worker_id)
        return channel.read_last_words() if channel is not None else LastWords()

    def withdraw_weights(self, version: int, incident: Incident) -> None:
        """Put the weights before ``version`` back, and have the publisher hear of it."""
        if self.communicator.weights_version != version:
            return  # the publisher has pushed better ones already
        replacement = self.communicator.revert_weights()
        self._poisoned = PoisonedWeights(
            f"weights version {version} was withdrawn after the workers that applied it failed; "
            f"version {replacement} holds the previous weights again; last: {incident.summary}",
            version,
            replacement,
        )
        self.flow.pushed()

    def on_lost(self, worker_id: int, incident: Incident | None) -> None:
        """Fail what was expected of a slot's ended process."""
        channel = self.communicator.channels.get(worker_id)
        if channel is not None:
            what = incident.summary if incident is not None else "it has ended"
            channel.lose(
                WorkerLost(
                    f"worker {worker_id} was lost: {what}",
                    worker_id,
                    channel.incarnation,
                    incident.exitcode if incident is not None else 0,
                    incident.traceback if incident is not None else None,
                )
            )

    def on_escalated(self) -> None:
        """Wake everybody who waits for experiences that will not come."""
        self.flow.wake()

    def on_slot_closed(self, worker_id: int) -> None:
        """Forget a slot that will have no process any more."""
        self.communicator.remove(worker_id)
        self.flow.closed(worker_id)
