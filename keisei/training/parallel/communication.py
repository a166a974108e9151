"""WorkerCommunicator: the lines of all slots, and the weights that all workers share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from keisei.exceptions import QueueTimeout, WorkerError, WorkerLost
from keisei.ipc import serialize
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.threads import to_the_end
from keisei.naming import public
from keisei.protocol import messages
from keisei.protocol.batches import PendingBatch
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.protocol.line import Line
from keisei.protocol.receiver import QuietOwner
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.model_sync import ModelSynchronizer
from keisei.training.parallel.weights_source import WeightsSource
from keisei.worker import MAIN


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """How many frames wait in each queue, by worker.

    Attributes:
        num_workers: Slots.
        max_queue_size: Experiences per worker that may wait.
        experience_queue_sizes: Experiences that have arrived and were not taken.
        model_queue_sizes: Weights announcements that the worker has not taken up.
        control_queue_sizes: Control frames that the worker has not taken up.
    """

    num_workers: int
    max_queue_size: int
    experience_queue_sizes: tuple[int, ...]
    model_queue_sizes: tuple[int, ...]
    control_queue_sizes: tuple[int, ...]


@public
class WorkerCommunicator:
    """The pool's queues: a line for each slot, made anew for each process in it.

    A manager makes one for itself. Alone it serves applications that run their own processes:
    give ``endpoints(worker_id)`` to a worker's process there.

    Attributes:
        max_queue_size: Experiences per worker that may wait for the learner.
        timeout: Default deadline of commands and weights, in seconds.
        lines: The line of each slot's present process, by worker id.
        synchronizer: Owns the weights.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        max_queue_size: int = 4,
        timeout: float = 30.0,
        lines: Mapping[int, Line] | None = None,
        synchronizer: ModelSynchronizer | None = None,
    ) -> None:
        """Make the queues of ``num_workers`` slots.

        Args:
            num_workers: Slots.
            max_queue_size: Experiences per worker that may wait for the learner.
            timeout: Default deadline of commands and weights, in seconds.
            lines: The lines of a pool that makes them by itself, always as they are now;
                ``None`` makes ``num_workers`` lines here.
            synchronizer: Owns the weights of that pool; ``None`` makes one.
        """
        self.max_queue_size = max_queue_size
        self.timeout = timeout
        self._sequence = itertools.count(1)
        self._arrivals: list[PendingBatch] = []
        self._arrived = asyncio.Event()
        self._own: dict[int, Line] = {}
        self.lines: Mapping[int, Line] = self._own if lines is None else lines
        self.synchronizer = synchronizer or ModelSynchronizer(lines=self.lines)
        for worker_id in range(num_workers):
            self._own[worker_id] = self._line(worker_id, 0)

    # the queues

    @property
    def num_workers(self) -> int:
        """Slots that have a line."""
        return len(self.lines)

    @property
    def experience_queues(self) -> list[FrameReader]:
        """The receiving ends for frames about experiences, one for each worker."""
        return [self.lines[key].experience for key in sorted(self.lines)]

    @property
    def model_queues(self) -> list[FrameWriter]:
        """The sending ends for announcements of weights, one for each worker."""
        return [self.lines[key].model for key in sorted(self.lines)]

    @property
    def control_queues(self) -> list[FrameWriter]:
        """The sending ends for commands, one for each worker."""
        return [self.lines[key].control for key in sorted(self.lines)]

    def renew(self, worker_id: int, incarnation: int | None = None) -> Line:
        """Give a slot fresh queues, for its next process; nothing of the old ones remains.

        Whoever still waits for the old process gets ``WorkerLost``.

        Args:
            worker_id: The slot, which may be a new one.
            incarnation: The number of the process; ``None`` counts on.

        Raises:
            OSError: There are no descriptors left; the slot keeps its old queues.
        """
        old = self._own.get(worker_id)
        if incarnation is None:
            incarnation = old.incarnation + 1 if old is not None else 0
        line = self._line(worker_id, incarnation)
        if old is not None:
            old.lose(_lost(old, "its queues were renewed"))
        self._own[worker_id] = line
        return line

    def remove(self, worker_id: int) -> None:
        """Close a slot's queues for good."""
        line = self._own.pop(worker_id, None)
        if line is not None:
            line.lose(_lost(line, "its slot was removed"))

    def endpoints(self, worker_id: int) -> WorkerEndpoints:
        """Take out the worker's ends of its queues, once, and begin to listen to it."""
        line = self.lines[worker_id]
        ends = line.endpoints()
        line.listen(_Owner(self._keep))
        self.synchronizer.introduce(line)
        return ends

    def _line(self, worker_id: int, incarnation: int) -> Line:
        return Line(
            worker_id,
            incarnation,
            self.max_queue_size,
            newest_named=self.synchronizer.newest_named,
        )

    # commands

    async def send_control_command(
        self,
        command: str,
        data: Any = None,
        worker_ids: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> dict[int, Any]:
        """Have workers handle a command between two experiences and return their replies.

        Each worker handles it at most once. Safe to cancel: late replies are dropped.

        Args:
            command: "reset" calls ``reset``, any other name ``on_command``.
            data: Picklable; tensors are copied.
            worker_ids: Whom to ask; ``None`` asks all.
            timeout: Seconds; ``None`` takes the communicator's.

        Raises:
            SerializationError: ``data`` cannot be pickled; nothing was sent.
            CommandError: A worker answered with an error.
            WorkerLost: A worker died before it answered.
            CommandTimeout: A worker did not answer in time.
        """
        return await self.command(self._chosen(worker_ids), command, data, timeout)

    async def command(
        self, lines: Mapping[int, Line], command: str, data: Any, timeout: float | None
    ) -> dict[int, Any]:
        """Do as ``send_control_command`` for the processes at the other ends of ``lines``.

        A successor of one of them is not asked.
        """
        what = f"the data of command {command!r}"
        if serialize.is_large(data):
            payload = await to_the_end(lambda: serialize.dumps(data, what))
        else:
            payload = serialize.dumps(data, what)
        message = messages.Command(next(self._sequence), command, payload)
        return await self._request(lines, message.sequence, command, message, timeout)

    async def pause(
        self, worker_ids: Iterable[int] | None = None, timeout: float | None = None
    ) -> None:
        """Return when the workers stand still; errors as in ``send_control_command``."""
        message = messages.Pause(next(self._sequence))
        lines = self._chosen(worker_ids)
        await self._request(lines, message.sequence, "pause", message, timeout)

    def _chosen(self, worker_ids: Iterable[int] | None) -> dict[int, Line]:
        """Return the lines of the processes that are there now."""
        chosen = sorted(self.lines) if worker_ids is None else list(dict.fromkeys(worker_ids))
        unknown = [worker_id for worker_id in chosen if worker_id not in self.lines]
        if unknown:
            raise ValueError(f"no such worker: {unknown}; there are {sorted(self.lines)}")
        return {worker_id: self.lines[worker_id] for worker_id in chosen}

    async def _request(
        self,
        lines: Mapping[int, Line],
        sequence: int,
        name: str,
        message: Any,
        timeout: float | None,
    ) -> dict[int, Any]:
        """Send one frame, packed once, to several workers and gather their answers."""
        limit = self.timeout if timeout is None else timeout
        frame = messages.pack(message)
        if len(lines) == 1:
            ((worker_id, line),) = lines.items()
            return {worker_id: await line.ask(sequence, name, frame, limit)}
        asking = [line.ask(sequence, name, frame, limit) for line in lines.values()]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        return _replies(dict(zip(lines, answers, strict=True)))

    # weights

    @property
    def weights_version(self) -> int:
        """The newest version; 0 is none."""
        return self.synchronizer.version

    async def send_model_weights(
        self,
        weights: WeightsSource,
        *,
        name: str = MAIN,
        wait: bool = False,
        worker_ids: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Publish weights to all workers at once and return their version.

        They are copied once, whatever the number of workers; a worker takes the newest version
        before its next experience. When cancelled, the version is either published or not.

        Args:
            weights: A module, a state dict with dense tensors on any device, or a snapshot.
            name: The name of the weights.
            wait: Also wait until workers have applied this version or a newer one.
            worker_ids: For whom to wait; ``None`` for all that live.
            timeout: Seconds for the wait; ``None`` takes the communicator's.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights, or a
                worker has nothing to load them into.
            CommandTimeout: A worker has not applied the version in time; it is published.
        """
        version = await self.synchronizer.push(weights, name)
        if wait:
            limit = self.timeout if timeout is None else timeout
            await self.synchronizer.wait_applied(version, worker_ids, timeout=limit, name=name)
        return version

    # experiences, where no manager takes them

    def _keep(self, arrival: PendingBatch) -> None:
        self._arrivals.append(arrival)
        self._arrived.set()

    async def collect_experiences(
        self, max_batches: int | None = None, timeout: float | None = None
    ) -> list[ExperienceBatch]:
        """Take what has arrived; wait for the first one.

        Workers are granted ``max_queue_size`` experiences, and one more for each that is taken.
        Safe to cancel: nothing is taken then.

        Args:
            max_batches: At most this many; ``None`` takes all.
            timeout: Seconds; ``None`` takes the communicator's.

        Raises:
            QueueTimeout: Nothing arrived in time.
        """
        for worker_id, line in self.lines.items():
            waiting = self._num_kept_of(worker_id)
            line.grant(self.max_queue_size - line.outstanding - waiting)
        limit = self.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                while not self._arrivals:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise QueueTimeout(f"no experience arrived within {limit:g} s") from None
        count = len(self._arrivals) if max_batches is None else max_batches
        taken, self._arrivals = self._arrivals[:count], self._arrivals[count:]
        return [ExperienceBatch.of(arrival, self.weights_version) for arrival in taken]

    # all of them

    def get_queue_info(
        self,
        worker_ids: Iterable[int] | None = None,
        num_queued_of: Callable[[int], int] | None = None,
    ) -> QueueInfo:
        """Return how many frames wait in each queue.

        Args:
            worker_ids: The slots; ``None`` takes those that have a line. A slot between two
                processes has no queue in which anything could wait.
            num_queued_of: Tells how many experiences of a worker wait, where a manager takes
                them instead of ``collect_experiences``.
        """
        slots = sorted(self.lines if worker_ids is None else worker_ids)
        queued = num_queued_of or self._num_kept_of
        lines = [self.lines.get(worker_id) for worker_id in slots]
        return QueueInfo(
            num_workers=len(slots),
            max_queue_size=self.max_queue_size,
            experience_queue_sizes=tuple(queued(worker_id) for worker_id in slots),
            model_queue_sizes=tuple(line.model.qsize() if line else 0 for line in lines),
            control_queue_sizes=tuple(line.control.qsize() if line else 0 for line in lines),
        )

    def _num_kept_of(self, worker_id: int) -> int:
        return sum(arrival.worker_id == worker_id for arrival in self._arrivals)

    async def cleanup(self) -> None:
        """Close every queue made here and give the weights' memory back; may be called again.

        Whoever still waits for a worker gets ``WorkerLost``. Batches stay valid.
        """
        self._arrivals.clear()
        for line in self._own.values():
            line.lose(_lost(line, "the pool has ended"))
        self.synchronizer.close()


class _Owner(QuietOwner):
    """Keeps experiences; the application watches its processes by itself."""

    def __init__(self, keep: Callable[[PendingBatch], None]) -> None:
        self._keep = keep

    def on_batch(self, batch: PendingBatch) -> None:
        """Keep an experience."""
        self._keep(batch)


def _lost(line: Line, why: str) -> WorkerLost:
    return WorkerLost(
        f"worker {line.worker_id} (incarnation {line.incarnation}) is gone: {why}",
        line.worker_id,
        line.incarnation,
    )


def _replies(answers: dict[int, Any]) -> dict[int, Any]:
    """Return the answers, or raise the first error with all others in it."""
    errors = {key: value for key, value in answers.items() if isinstance(value, BaseException)}
    if not errors:
        return answers
    for error in errors.values():
        if not isinstance(error, WorkerError):
            raise error
    failures = {key: error for key, error in errors.items() if isinstance(error, WorkerError)}
    first = next(iter(failures.values()))
    first.replies = {key: value for key, value in answers.items() if key not in errors}
    first.errors = failures
    for other in list(failures.values())[1:]:
        first.add_note(f"also: {str(other).splitlines()[0]}")
    raise first


__all__ = ["QueueInfo", "WorkerCommunicator"]
