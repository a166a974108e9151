"""Receiver: reads what one worker sends, and tells the owner of its line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from keisei.exceptions import QueueBroken, QueueClosed, QueueEnded, SerializationError
from keisei.ipc import serialize
from keisei.ipc.descriptors import Descriptors
from keisei.ipc.frame_reader import Frame, FrameReader
from keisei.ipc.threads import in_thread
from keisei.protocol import messages
from keisei.protocol.batches import BatchParser, PendingBatch
from keisei.protocol.coalescer import Coalescer
from keisei.protocol.errors import ProtocolError
from keisei.protocol.requests import Requests, Unreadable


class LineOwner(Protocol):
    """The object that a line tells what its worker says, in the event loop."""

    def on_batch(self, batch: PendingBatch) -> None:
        """Called for each experience, in the order in which the worker committed them."""
        ...

    def on_ready(self) -> None:
        """Called when the worker has finished its start."""
        ...

    def on_farewell(self) -> None:
        """Called when the worker has announced its end: a goodbye, or a hook that raised."""
        ...

    def on_trouble(self, what: str, *, may_be_dying: bool) -> None:
        """Called when the worker broke the protocol, or closed a queue, as a dying one does."""
        ...

    def on_work(self) -> None:
        """Called when the worker was given something to do."""
        ...

    def on_error(self, error: Exception) -> None:
        """Called when the application's side failed to take in what the worker sent."""
        ...


class QuietOwner:
    """An owner without a supervisor: it does nothing about a worker but what a subclass adds."""

    def on_batch(self, batch: PendingBatch) -> None:
        """Give the experience back unread."""

    def on_ready(self) -> None:
        """Do nothing."""

    def on_farewell(self) -> None:
        """Do nothing."""

    def on_trouble(self, what: str, *, may_be_dying: bool) -> None:
        """Do nothing."""

    def on_work(self) -> None:
        """Do nothing."""

    def on_error(self, error: Exception) -> None:
        """Raise it in the event loop."""
        raise error


class Receiver:
    """The reading side of a line.

    A frame that cannot be parsed is the sender's fault. An exception raised afterwards, by the
    owner that takes
    the result, is the application's, and is told as that.

    Attributes:
        parser: Turns frames into experiences, and counts them.
        granted: Experiences that the worker was allowed to collect so far.
        received: Experiences that were handed on. One that is being parsed in a thread counts
            only then: between the two nothing else would account for it.
        owner: Told what the worker says; ``None`` before ``listen`` and after ``close``.
        takes_weights: Whether the worker can load weights; ``None`` until it is ready.
        settings_version: The newest version of the settings that the worker was told.
        goodbye: The worker's announcement of an orderly end.
        failed: The worker's announcement that a hook raised.
    """

    def __init__(
        self,
        experience: FrameReader,
        reply: FrameReader,
        parser: BatchParser,
        requests: Requests,
        newest_version: Callable[[], int],
    ) -> None:
        self._experience = experience
        self._reply = reply
        self.parser = parser
        self._requests = requests
        self._newest_version = newest_version
        self._coalescer = Coalescer()
        self._parsing: asyncio.Future[PendingBatch] | None = None
        self._unpacking: set[asyncio.Future[Any]] = set()
        self.granted = 0
        self.received = 0
        self.owner: LineOwner | None = None
        self.takes_weights: bool | None = None
        self.settings_version = 0
        self.goodbye: messages.Goodbye | None = None
        self.failed: messages.Failed | None = None

    def listen(self, owner: LineOwner) -> None:
        """Tell ``owner`` what the worker says, in the running loop."""
        self.owner = owner
        self._reply.listen(self._on_reply)
        self._experience.listen(self._on_experience)

    def close(self) -> None:
        """Close both queues; the owner is told nothing any more."""
        self.owner = None
        self._experience.close()
        self._reply.close()
        self.parser.close()

    @property
    def outstanding(self) -> int:
        """Experiences that the worker may collect or is collecting, or that are being parsed."""
        return self.granted - self.received

    async def read_arrived(self) -> None:
        """Deliver every experience that was sent up to this moment."""
        if self.owner is not None:
            self._experience.drain()
            await self._take_all(self._on_experience)

    async def read_to_the_end(self) -> None:
        """Deliver everything that the worker has sent; call it once its process has ended."""
        await self.read_arrived()
        if self.owner is not None:
            self._reply.drain()
            await self._take_all(self._on_reply)

    async def _take_all(self, take: Callable[[], None]) -> None:
        take()
        while under_way := {*self._unpacking, *filter(None, [self._parsing])}:
            await asyncio.wait(under_way)
            if self.owner is not None:
                take()

    # experiences

    def _on_experience(self) -> None:
        before = self.received
        self._take_experiences()
        now = asyncio.get_running_loop().time()
        count = self.received - before
        look_at = self._coalescer.next_look(now, count, self.outstanding)
        if look_at is not None:
            self._experience.rest(look_at)

    def _take_experiences(self) -> None:
        """Take all frames. A heavy frame is parsed in a thread; later frames wait for it."""
        while self._parsing is None and (frame := self._next(self._experience)) is not None:
            if self.parser.is_heavy(frame[0]):
                self._parsing = in_thread(lambda heavy=frame: self._parse(*heavy))  # type: ignore[misc]
                self._parsing.add_done_callback(self._on_parsed)
                return
            try:
                batch = self._parse(*frame)
            except Exception as error:  # noqa: BLE001 - told as what it is
                self._tell(error)
            else:
                self._hand_over(batch)

    def _parse(self, payload: memoryview, fds: Descriptors) -> PendingBatch:
        return self.parser.parse(
            payload,
            fds,
            outstanding=self.granted - self.parser.received,
            newest_version=self._newest_version(),
            newest_settings=self.settings_version,
        )

    def _on_parsed(self, parsing: asyncio.Future[PendingBatch]) -> None:
        self._parsing = None
        error = parsing.exception()
        if error is None:
            self._hand_over(parsing.result())
        else:
            self._tell(error)
        if self.owner is not None:
            self._on_experience()

    def _hand_over(self, batch: PendingBatch) -> None:
        self.received += 1
        if self.owner is not None:
            try:
                self.owner.on_batch(batch)
            except Exception as error:  # noqa: BLE001 - told as what it is
                self._tell(error)

    # replies

    def _on_reply(self) -> None:
        while (frame := self._next(self._reply)) is not None:
            try:
                self._take_reply(*frame)
            except Exception as error:  # noqa: BLE001 - told as what it is
                self._tell(error)

    def _take_reply(self, payload: memoryview, fds: Descriptors) -> None:
        """Handle a message. The value of a large reply is unpickled in a thread."""
        message = messages.unpack(payload, messages.REPLY, fds)
        if messages.is_heavy(message):
            unpacking = in_thread(lambda: (message, _value_of(message)))
            self._unpacking.add(unpacking)
            unpacking.add_done_callback(self._on_unpacked)
        else:
            self._handle(message, _value_of(message))

    def _on_unpacked(self, unpacking: asyncio.Future[Any]) -> None:
        self._unpacking.discard(unpacking)
        try:
            self._handle(*unpacking.result())
        except Exception as error:  # noqa: BLE001 - told as what it is
            self._tell(error)

    def _handle(self, message: Any, value: Any) -> None:
        if isinstance(message, (messages.Reply, messages.ReplyError)):
            self._requests.answer(message, value)
        elif isinstance(message, messages.Applied):
            self._requests.applied(message.number, message.version)
        elif isinstance(message, (messages.Configured, messages.Refused)):
            self._requests.configured(message)
        elif self.owner is None:
            return
        elif isinstance(message, messages.Ready):
            if self.takes_weights is not None:
                raise ProtocolError("it says again that it is ready")
            self.takes_weights = message.takes_weights
            self.owner.on_ready()
        elif isinstance(message, messages.Failed):
            self.failed = message
            self.owner.on_farewell()
        else:
            self.goodbye = message
            self.owner.on_farewell()

    # both

    def _next(self, reader: FrameReader) -> Frame | None:
        """Return the next frame that has arrived, or ``None``."""
        if self.owner is None:
            return None
        try:
            return reader.pop()
        except (QueueEnded, QueueBroken) as error:
            if self.goodbye is None and self.failed is None:
                self.owner.on_trouble(f"a queue has ended: {error}", may_be_dying=True)
        except QueueClosed:
            pass  # by the owner, who was told of the frame before
        return None

    def _tell(self, error: BaseException) -> None:
        """Tell the owner of an error: the worker's if a frame made no sense, else our own."""
        if self.owner is None:
            return
        if isinstance(error, ProtocolError):
            self.owner.on_trouble(f"a frame makes no sense: {error}", may_be_dying=False)
        elif isinstance(error, Exception):
            self.owner.on_error(error)
        else:
            raise error


def _value_of(message: Any) -> Any:
    """Return the value of a reply, or ``Unreadable``; ``None`` for any other message."""
    if not isinstance(message, messages.Reply):
        return None
    try:
        return serialize.loads(message.payload, "")
    except SerializationError as problem:
        return Unreadable(str(problem).strip())
