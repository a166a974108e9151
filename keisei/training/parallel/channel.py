"""One incarnation as the application talks to it: four private queues and a status line."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from keisei.exceptions import (
    CommandError,
    CommandTimeout,
    QueueBroken,
    QueueClosed,
    QueueEnded,
    QueueWouldBlock,
    SerializationError,
    WorkerError,
    WorkerLost,
)
from keisei.ipc import serialize
from keisei.ipc.layout import Layout, Views
from keisei.ipc.queues import AsyncQueue
from keisei.ipc.ring import Place, RingReader
from keisei.ipc.status import Phase, StatusLine
from keisei.protocol import messages
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.supervision.exits import LastWords
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.rhythm import Rhythm

E = TypeVar("E")

_REMEMBERED = 256
_NO_VIEWS = Views(Layout((), 0))


class Arrival(NamedTuple):
    """An experience that a worker has committed and nobody has taken.

    It owns its slot: to let go of it gives the slot back unread.
    """

    channel: Channel
    slot: Any
    views: Views
    info: Mapping[str, Any]
    num_steps: int
    sequence: int
    version: int
    seed: int

    def open(self, newest_version: int) -> ExperienceBatch:
        """Wrap the shared memory as tensors, which own the slot too."""
        channel, slot, views, info, num_steps, sequence, version, seed = self
        return ExperienceBatch(
            views.on(slot),
            info,
            num_steps,
            channel.worker_id,
            channel.incarnation,
            sequence,
            version,
            max(0, newest_version - version),
            seed,
        )


class Listener(NamedTuple):
    """What a channel tells, in the event loop."""

    on_arrival: Callable[[Arrival], None]
    on_ready: Callable[[Channel], None]
    on_trouble: Callable[[Channel, str, bool], None]
    """Channel, what is wrong, and whether the worker may simply be dying."""


class Channel:
    """The application's ends of one incarnation's queues.

    Attributes:
        granted: Experiences that the worker was allowed to collect so far.
        received: Experiences that have arrived.
        is_ready: It has finished its start.
        is_paused: It was told to stand still and not to go on again; it owes no experience.
    """

    def __init__(self, worker_id: int, incarnation: int, max_queue_size: int) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        with contextlib.ExitStack() as undo:
            self.experience: AsyncQueue[Any] = AsyncQueue(max_queue_size, manual=True)
            undo.callback(self.experience.close)
            self.model: AsyncQueue[Any] = AsyncQueue()
            undo.callback(self.model.close)
            self.control: AsyncQueue[Any] = AsyncQueue()
            undo.callback(self.control.close)
            self.reply: AsyncQueue[Any] = AsyncQueue(manual=True)
            undo.callback(self.reply.close)
            self.status = StatusLine()
            undo.pop_all()
        self._ring = RingReader()
        self.granted = 0
        self.received = 0
        self.is_ready = False
        self.is_paused = False
        self._views = _NO_VIEWS
        self._rhythm = Rhythm()
        self._goodbye: messages.Goodbye | None = None
        self._failed: messages.Failed | None = None
        self._listener: Listener | None = None
        self._pending: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._applying: list[tuple[int, asyncio.Future[int]]] = []
        self._commands: dict[int, str] = {}
        self._lost: WorkerLost | None = None
        self._unpacking: set[asyncio.Future[Any]] = set()
        self._unsent: deque[bytes] = deque()
        self._sending: asyncio.Task[None] | None = None

    def endpoints(self) -> WorkerEndpoints:
        """Take the worker's ends out; they can be given away once."""
        return WorkerEndpoints(
            control=self.control.take_reader(),
            model=self.model.take_reader(),
            reply=self.reply.take_writer(),
            experience=self.experience.take_writer(),
            status=self.status,
        )

    def listen(self, listener: Listener) -> None:
        """Hear the worker in the running loop."""
        self._listener = listener
        _held(self.reply.reader).listen(self._on_reply)
        _held(self.experience.reader).listen(self._on_experience)

    # to the worker

    def send(self, message: Any) -> None:
        """Send a control frame behind those before it, as soon as there is room.

        Raises:
            QueueEnded: The worker can hear no more.
        """
        payload = messages.pack(message)
        if not self._unsent:
            try:
                _held(self.control.writer).put_nowait(payload)
            except QueueWouldBlock:
                self._sending = asyncio.ensure_future(self._send_rest())
            else:
                return
        self._unsent.append(payload)

    async def _send_rest(self) -> None:
        writer = _held(self.control.writer)
        with contextlib.suppress(QueueEnded, QueueClosed):
            while self._unsent:
                await writer.put(self._unsent[0])
                self._unsent.popleft()
        self._unsent.clear()

    def grant(self, credits: int) -> None:
        """Allow the worker to collect ``credits`` more experiences."""
        if credits > 0:
            self.granted += credits
            _held(self.experience.reader).grant(credits)

    def announce(self, message: Any, fd: int | None = None) -> None:
        """Send a frame about weights; raises ``QueueWouldBlock`` or ``QueueEnded``."""
        fds = [] if fd is None else [fd]
        _held(self.model.writer).put_nowait(messages.pack(message), fds)

    @property
    def outstanding(self) -> int:
        """Experiences that the worker may collect or is collecting."""
        return self.granted - self.received

    @property
    def owes(self) -> bool:
        """Whether the worker has been given something to do and has not done it."""
        collecting = self.outstanding > 0 and not self.is_paused
        return bool(collecting or self._pending or self._applying)

    async def request(self, sequence: int, name: str, message: Any, timeout: float) -> Any:
        """Send a control frame and wait for its answer.

        Safe to cancel: a late answer is dropped.

        Raises:
            CommandError: The worker answered with an error.
            CommandTimeout: It did not answer within ``timeout`` seconds.
            WorkerLost: It died before it answered.
        """
        if self._lost is not None:
            raise _copy(self._lost)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        # Not asyncio.timeout: this path is every command's, and a bare timer is a third of it.
        timer = loop.call_later(timeout, self._expire, future, name, timeout)
        self._pending[sequence] = (name, future)
        self._remember(sequence, name)
        try:
            # A worker that is dying has its cause told by the supervisor, through the future.
            with contextlib.suppress(QueueEnded):
                self.send(message)
            return await future
        finally:
            timer.cancel()
            self._pending.pop(sequence, None)

    def _expire(self, future: asyncio.Future[Any], name: str, timeout: float) -> None:
        if not future.done():
            future.set_exception(
                CommandTimeout(
                    f"worker {self.worker_id} did not answer {name!r} within {timeout:g} s; it is "
                    f"in {self.phase.name.lower()}",
                    self.worker_id,
                    self.incarnation,
                )
            )

    def _remember(self, sequence: int, name: str) -> None:
        """Keep the names of the last commands, for an incident to tell."""
        self._commands[sequence] = name
        if len(self._commands) > _REMEMBERED:
            del self._commands[next(iter(self._commands))]

    def expect_applied(self, version: int) -> asyncio.Future[int]:
        """Return a future of the version, this or a newer one, that the worker acknowledges.

        It raises ``WorkerLost`` if the worker dies first.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            future.set_exception(_copy(self._lost))
        else:
            entry = (version, future)
            self._applying.append(entry)
            future.add_done_callback(lambda _: self._applying.remove(entry))
        return future

    # from the worker

    def read_arrived(self) -> None:
        """Hear now of every experience that was sent up to this moment."""
        if self._listener is not None:
            _held(self.experience.reader).drain()
            self._on_experience()

    def _on_experience(self) -> None:
        before = self.received
        self._take_all(self.experience, self._experience)
        now = asyncio.get_running_loop().time()
        look_at = self._rhythm.next_look(now, self.received - before, self.outstanding)
        if look_at is not None:
            _held(self.experience.reader).rest(look_at)

    def _on_reply(self) -> None:
        self._take_all(self.reply, self._hear)

    def _take_all(
        self, queue: AsyncQueue[Any], handle: Callable[[memoryview, list[int]], None]
    ) -> None:
        reader = _held(queue.reader)
        try:
            while (frame := reader.pop()) is not None:
                handle(*frame)
        except (QueueEnded, QueueBroken) as error:
            if self._goodbye is None and self._failed is None:
                self._trouble(f"a queue has ended: {error}", may_be_dying=True)
        except (SerializationError, OSError, TypeError, AttributeError, IndexError) as error:
            self._trouble(f"a frame makes no sense: {error}", may_be_dying=False)

    def _trouble(self, what: str, *, may_be_dying: bool) -> None:
        if self._listener is not None:
            self._listener.on_trouble(self, what, may_be_dying)

    def _experience(self, payload: memoryview, fds: list[int]) -> None:
        frame: messages.ExperienceFrame = messages.unpack(payload)
        if frame.new_segment:
            self._ring.add(frame.segment, fds[0])
        if frame.layout is not None:
            self._views = Views(frame.layout)
        views = self._views
        place = Place(frame.segment, frame.slot, frame.stride, views.layout)
        self._ring.check(place)
        info = {} if frame.info is None else serialize.loads(frame.info, "Experience.info")
        self.received += 1
        if self._listener is not None:
            self._listener.on_arrival(
                Arrival(
                    self,
                    self._ring.slot(place),
                    views,
                    info,
                    frame.num_steps,
                    frame.sequence,
                    frame.version,
                    frame.seed,
                )
            )

    def _hear(self, payload: memoryview, _: list[int]) -> None:
        if len(payload) <= serialize.LARGE:
            self._answer(*_unpacked(payload))
            return
        unpacking = asyncio.get_running_loop().run_in_executor(None, _unpacked, payload)
        self._unpacking.add(unpacking)
        unpacking.add_done_callback(self._on_unpacked)

    def _on_unpacked(self, unpacking: asyncio.Future[Any]) -> None:
        self._unpacking.discard(unpacking)
        try:
            self._answer(*unpacking.result())
        except (SerializationError, TypeError, AttributeError) as error:
            self._trouble(f"a frame makes no sense: {error}", may_be_dying=False)
        if self._lost is not None and not self._unpacking:
            self._fail_all(self._lost)

    def _answer(self, message: Any, value: Any) -> None:
        if isinstance(message, (messages.Reply, messages.ReplyError)):
            name, future = self._pending.get(message.sequence, ("", None))
            if future is not None and not future.done():
                self._resolve(future, name, message, value)
        elif isinstance(message, messages.Applied):
            for version, future in list(self._applying):
                if version <= message.version and not future.done():
                    future.set_result(message.version)
        elif isinstance(message, messages.Ready):
            self.is_ready = True
            if self._listener is not None:
                self._listener.on_ready(self)
        elif isinstance(message, messages.Failed):
            self._failed = message
        elif isinstance(message, messages.Goodbye):
            self._goodbye = message

    def _resolve(
        self,
        future: asyncio.Future[Any],
        name: str,
        message: messages.Reply | messages.ReplyError,
        value: Any,
    ) -> None:
        if isinstance(message, messages.ReplyError):
            error = f"worker {self.worker_id} answered command {name!r} with an error: "
            error += message.message
            trace = message.traceback or None
        elif isinstance(value, _Unreadable):
            error, trace = f"worker {self.worker_id}: the reply to {name!r} {value.reason}", None
        else:
            future.set_result(value)
            return
        future.set_exception(
            CommandError(error, self.worker_id, self.incarnation, remote_traceback=trace)
        )

    # its end

    def read_last_words(self) -> LastWords:
        """Read both queues to their end, then let go of everything.

        Committed experiences are heard as usual; call it once the process has ended.
        """
        if self._listener is not None:
            for queue, take in (
                (self.experience, self._on_experience),
                (self.reply, self._on_reply),
            ):
                _held(queue.reader).drain()
                take()
        status, failed, goodbye = self.status, self._failed, self._goodbye
        return LastWords(
            said_goodbye=goodbye is not None,
            recycle=goodbye.recycle if goodbye is not None else "",
            failure=failed.message if failed is not None else "",
            traceback=failed.traceback if failed is not None else None,
            phase=failed.phase if failed is not None else status.phase.name.lower(),
            version=status.version,
            experiences_lost=max(0, status.begun - self.received),
            # A reply that is being unpacked is not lost; its command may have been given up.
            commands_lost=max(0, self._num_unanswered() - len(self._unpacking)),
            last_command=self._commands.get(status.command) if status.command else None,
            rss=status.rss,
        )

    def _num_unanswered(self) -> int:
        return sum(not future.done() for _, future in self._pending.values())

    def lose(self, error: WorkerLost) -> None:
        """Fail everybody who still waits for this incarnation, and close the queues."""
        self._lost = error
        self.close()
        if not self._unpacking:  # its last answers may be among them
            self._fail_all(error)

    def _fail_all(self, error: WorkerLost) -> None:
        waiting: list[asyncio.Future[Any]] = [future for _, future in self._pending.values()]
        waiting += [future for _, future in self._applying]
        for future in waiting:
            if not future.done():
                future.set_exception(_copy(error))

    def close(self) -> None:
        """Close the queues; batches that were delivered stay valid."""
        self._listener = None
        for queue in (self.experience, self.model, self.control, self.reply):
            queue.close()
        self.status.close()
        self._ring.close()

    @property
    def phase(self) -> Phase:
        """What the worker says it is doing."""
        return self.status.phase


class _Unreadable(NamedTuple):
    """In place of a reply's value that cannot be rebuilt here."""

    reason: str


def _unpacked(payload: memoryview) -> tuple[Any, Any]:
    """Return the message in a frame, and the value of a reply."""
    message = messages.unpack(payload)
    if not isinstance(message, messages.Reply):
        return message, None
    try:
        return message, serialize.loads(message.payload, "")
    except SerializationError as problem:
        return message, _Unreadable(str(problem).strip())


def _held(end: E | None) -> E:
    """Return the end of a queue that is on this side."""
    if end is None:
        raise QueueClosed("this end of the queue was given to the worker")
    return end


def _copy(error: WorkerError) -> WorkerError:
    """Return the same error anew: one exception must not be raised in two tasks."""
    kind, facts = error.__reduce__()[:2]
    copy: WorkerError = kind(*facts)
    return copy


__all__ = ["Arrival", "Channel", "Listener"]
