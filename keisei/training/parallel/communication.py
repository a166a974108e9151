"""WorkerCommunicator: every worker's private queues and the weights that all of them share."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from keisei.exceptions import (
    CommandTimeout,
    QueueClosed,
    QueueEnded,
    QueueTimeout,
    QueueWouldBlock,
    WeightsError,
    WorkerError,
    WorkerLost,
)
from keisei.ipc import serialize
from keisei.ipc.layout import Layout, describe
from keisei.ipc.queues import AsyncQueue
from keisei.ipc.weights import HasStateDict, WeightsPublisher, tensors_of
from keisei.naming import public
from keisei.protocol import messages
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.channel import Arrival, Channel, Listener

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_QUICK_COPY = 1 << 22
"""Bytes that are copied in the event loop: in less time than a thread takes, or not much more."""


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
    """The pool's queues: a set for each slot, made anew for each process in it.

    A manager makes one for itself. Alone it serves tests and applications that run their own
    processes: give ``endpoints(worker_id)`` to a ``WorkerRuntime`` there.
    """

    def __init__(self, num_workers: int, *, max_queue_size: int = 4, timeout: float = 30.0) -> None:
        """Make the queues of ``num_workers`` slots.

        Args:
            num_workers: Slots.
            max_queue_size: Experiences per worker that may wait for the learner.
            timeout: Default deadline of commands and weights, in seconds.
        """
        self.max_queue_size = max_queue_size
        self.timeout = timeout
        self._sequence = itertools.count(1)
        self._publisher: WeightsPublisher | None = None
        self._publishing = asyncio.Lock()
        self._arrivals: list[Arrival] = []
        self._arrived = asyncio.Event()
        self._listener = Listener(self._keep, _ignore, _ignore)
        self.channels: dict[int, Channel] = {
            worker_id: Channel(worker_id, 0, max_queue_size) for worker_id in range(num_workers)
        }

    # the queues

    @property
    def num_workers(self) -> int:
        """Slots."""
        return len(self.channels)

    @property
    def experience_queues(self) -> list[AsyncQueue[Any]]:
        """Frames about experiences, from each worker."""
        return [self.channels[key].experience for key in sorted(self.channels)]

    @property
    def model_queues(self) -> list[AsyncQueue[Any]]:
        """Announcements of weights, to each worker."""
        return [self.channels[key].model for key in sorted(self.channels)]

    @property
    def control_queues(self) -> list[AsyncQueue[Any]]:
        """Commands, to each worker."""
        return [self.channels[key].control for key in sorted(self.channels)]

    def use(self, listener: Listener) -> None:
        """Hand arrivals and readiness to ``listener`` instead of ``collect_experiences``."""
        self._listener = listener

    def renew(self, worker_id: int, incarnation: int | None = None) -> Channel:
        """Give a slot fresh queues, for its next process; nothing of the old ones remains.

        Whoever still waits for the old process gets ``WorkerLost``.

        Args:
            worker_id: The slot, which may be a new one.
            incarnation: The number of the process; ``None`` counts on.
        """
        old = self.channels.get(worker_id)
        if old is not None:
            old.lose(self._lost(old, "its queues were renewed"))
        if incarnation is None:
            incarnation = old.incarnation + 1 if old is not None else 0
        self.channels[worker_id] = Channel(worker_id, incarnation, self.max_queue_size)
        return self.channels[worker_id]

    def remove(self, worker_id: int) -> None:
        """Close a slot's queues for good."""
        channel = self.channels.pop(worker_id, None)
        if channel is not None:
            channel.lose(self._lost(channel, "its slot was removed"))

    def endpoints(self, worker_id: int) -> WorkerEndpoints:
        """Take out the worker's ends of its queues, once, and begin to listen to it."""
        channel = self.channels[worker_id]
        ends = channel.endpoints()
        channel.listen(self._listener)
        if self._publisher is not None:
            channel.announce(messages.Arena(self._publisher.layout), self._publisher.fd)
        return ends

    @staticmethod
    def _lost(channel: Channel, why: str) -> WorkerLost:
        return WorkerLost(
            f"worker {channel.worker_id} (incarnation {channel.incarnation}) is gone: {why}",
            channel.worker_id,
            channel.incarnation,
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
        channels = self._chosen(worker_ids)  # now: a successor was not asked
        payload = await self._pickled(data, f"the data of command {command!r}")
        sequence = next(self._sequence)
        message = messages.Command(sequence, command, payload)
        return await self._request(channels, sequence, command, message, timeout)

    @staticmethod
    async def _pickled(data: Any, what: str) -> bytes:
        if serialize.estimated_size(data) > serialize.LARGE:
            return await asyncio.to_thread(serialize.dumps, data, what)
        return serialize.dumps(data, what)

    async def pause(self, worker_ids: Iterable[int], timeout: float | None = None) -> None:
        """Return when the workers stand still; errors as in ``send_control_command``."""
        sequence = next(self._sequence)
        channels = self._chosen(worker_ids)
        await self._request(channels, sequence, "pause", messages.Pause(sequence), timeout)

    def _chosen(self, worker_ids: Iterable[int] | None) -> dict[int, Channel]:
        """Return the processes that are there now."""
        chosen = sorted(self.channels) if worker_ids is None else list(dict.fromkeys(worker_ids))
        unknown = [worker_id for worker_id in chosen if worker_id not in self.channels]
        if unknown:
            raise ValueError(f"no such worker: {unknown}; there are {sorted(self.channels)}")
        return {worker_id: self.channels[worker_id] for worker_id in chosen}

    async def _request(
        self,
        channels: Mapping[int, Channel],
        sequence: int,
        name: str,
        message: Any,
        timeout: float | None,
    ) -> dict[int, Any]:
        """Send one frame to several workers and gather their answers."""
        limit = self.timeout if timeout is None else timeout

        def ask(channel: Channel) -> Coroutine[Any, Any, Any]:
            return channel.request(sequence, name, message, limit)

        if len(channels) == 1:
            ((worker_id, channel),) = channels.items()
            return {worker_id: await ask(channel)}
        answers = await asyncio.gather(*map(ask, channels.values()), return_exceptions=True)
        return _replies(dict(zip(channels, answers, strict=True)))

    # weights

    @property
    def weights_version(self) -> int:
        """The newest version; 0 is none."""
        return self._publisher.version if self._publisher is not None else 0

    @property
    def weights_nbytes(self) -> int:
        """Bytes of one version's tensors; 0 before the first."""
        return self._publisher.num_bytes if self._publisher is not None else 0

    async def send_model_weights(
        self,
        weights: HasStateDict | Mapping[str, torch.Tensor],
        *,
        wait: bool = False,
        worker_ids: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Publish weights to all workers at once and return their version.

        They are copied once, whatever the number of workers; a worker takes the newest version
        before its next experience. When cancelled, the version is either published or not.

        Args:
            weights: A module, or a state dict with dense tensors on any device.
            wait: Also wait until workers have applied this version or a newer one.
            worker_ids: For whom to wait; ``None`` for all that live.
            timeout: Seconds for the wait; ``None`` takes the communicator's.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights.
            CommandTimeout: A worker has not applied the version in time; it is published.
        """
        tensors = tensors_of(weights)
        async with self._publishing:
            publisher = self._publisher
            if publisher is None:
                publisher = self._publisher = await self._made(describe(tensors))
                for channel in self.channels.values():
                    self._announce(channel, messages.Arena(publisher.layout), publisher.fd)
            else:
                publisher.check(tensors)
            publish = functools.partial(publisher.publish, tensors)
            version = await _aside(publisher.layout.nbytes, publish, at_once=_QUICK_COPY)
        if wait:
            await self.wait_applied(version, worker_ids, timeout)
        return version

    @staticmethod
    async def _made(layout: Layout) -> WeightsPublisher:
        made: list[WeightsPublisher] = []
        try:
            await _aside(layout.nbytes, lambda: made.append(WeightsPublisher(layout)))
        except asyncio.CancelledError:
            for publisher in made:
                publisher.close()
            raise
        return made[0]

    def publish_at_once(self, weights: dict[str, torch.Tensor]) -> int | None:
        """Publish weights if that takes no more than a moment; else return ``None``.

        The first ones need memory, large ones a thread.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights.
        """
        publisher = self._publisher
        is_quick = publisher is not None and publisher.layout.nbytes <= _QUICK_COPY
        if publisher is None or not is_quick or self._publishing.locked():
            return None
        publisher.check(weights)
        return publisher.publish(weights)

    def revert_weights(self) -> int:
        """Publish the weights before the newest again, as a new version, which is returned."""
        if self._publisher is None or self._publisher.version <= 1:
            raise WeightsError("there are no weights before these")
        return self._publisher.revert()

    async def wait_applied(
        self, version: int, worker_ids: Iterable[int] | None = None, timeout: float | None = None
    ) -> None:
        """Wait until workers have taken ``version`` or a newer one; the dead are left out.

        Raises:
            CommandTimeout: A worker has not done so in time.
        """
        chosen = sorted(self.channels) if worker_ids is None else list(worker_ids)
        limit = self.timeout if timeout is None else timeout

        expected: dict[asyncio.Future[int], Channel] = {}
        for channel in [self.channels[worker_id] for worker_id in chosen]:
            expected[channel.expect_applied(version)] = channel
            self._announce(channel, messages.Announcement(version, acknowledge=True))
        if not expected:
            return
        try:
            _, late = await asyncio.wait(expected, timeout=limit)
        finally:
            for applied in expected:
                applied.cancel()
        for applied, channel in expected.items():
            if applied in late:
                raise CommandTimeout(
                    f"worker {channel.worker_id} has not applied weights version {version} within "
                    f"{limit:g} s; it is in {channel.phase.name.lower()}",
                    channel.worker_id,
                    channel.incarnation,
                )
            applied.exception()  # of a worker that was lost: its successor takes the newest

    @staticmethod
    def _announce(channel: Channel, message: Any, fd: int | None = None) -> None:
        try:
            channel.announce(message, fd)
        except (QueueWouldBlock, QueueEnded, QueueClosed):
            return  # it is dying, or has not read 200 announcements: the newest is owed anyway

    # experiences, where no manager takes them

    def _keep(self, arrival: Arrival) -> None:
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
        for channel in self.channels.values():
            waiting = sum(arrival.channel is channel for arrival in self._arrivals)
            channel.grant(self.max_queue_size - channel.outstanding - waiting)
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
        return [arrival.open(self.weights_version) for arrival in taken]

    # all of them

    def get_queue_info(self, num_queued_of: Callable[[int], int] | None = None) -> QueueInfo:
        """Return how many frames wait in each queue.

        Args:
            num_queued_of: Tells how many experiences of a worker wait, where a manager takes
                them instead of ``collect_experiences``.
        """
        queued = num_queued_of or self._num_kept_of
        return QueueInfo(
            num_workers=self.num_workers,
            max_queue_size=self.max_queue_size,
            experience_queue_sizes=tuple(queued(key) for key in sorted(self.channels)),
            model_queue_sizes=tuple(queue.qsize() for queue in self.model_queues),
            control_queue_sizes=tuple(queue.qsize() for queue in self.control_queues),
        )

    def _num_kept_of(self, worker_id: int) -> int:
        return sum(arrival.channel.worker_id == worker_id for arrival in self._arrivals)

    async def cleanup(self) -> None:
        """Close every queue and give the weights' memory back; may be called again.

        Whoever still waits for a worker gets ``WorkerLost``. Batches stay valid.
        """
        self._arrivals.clear()
        for channel in self.channels.values():
            channel.lose(self._lost(channel, "the pool has ended"))
        if self._publisher is not None:
            self._publisher.close()


async def _aside(nbytes: int, work: Callable[[], T], *, at_once: int = serialize.LARGE) -> T:
    """Do what moves ``nbytes`` in a thread unless they are few; when cancelled, once it is done."""
    if nbytes <= at_once:
        return work()
    working = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])  # whoever comes next must not meet it
        raise


def _ignore(*what: object) -> None:
    """Hear, and do nothing: without a manager nobody restarts a worker."""


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
