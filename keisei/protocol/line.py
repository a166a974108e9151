"""Line: the application's ends of one incarnation's queues, and its status."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from keisei.exceptions import (
    CommandTimeout,
    QueueClosed,
    QueueEnded,
    QueueWouldBlock,
    WorkerError,
)
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.status import Phase, StatusLine
from keisei.protocol import messages
from keisei.protocol.announcer import UNREAD, Announcer, Shared
from keisei.protocol.batches import BatchParser, any_named
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.protocol.last_words import LastWords
from keisei.protocol.receiver import LineOwner, Receiver
from keisei.protocol.requests import Requests, copy_of


def _any_version() -> int:
    return 2**63 - 1


class Line:
    """The application's ends of one incarnation's queues, and its status.

    It is born and lost with its process. Everything that gives the worker something to do tells
    the owner so (``on_work``).

    Attributes:
        worker_id: The slot.
        incarnation: The process of that slot.
        status: What the worker says it is doing.
        is_greeted: Whether the first frame was sent, which must come before any other.
    """

    def __init__(
        self,
        worker_id: int,
        incarnation: int,
        max_queue_size: int,
        newest_version: Callable[[], int] = _any_version,
        newest_named: Callable[[int], tuple[str, int]] = any_named,
    ) -> None:
        """Make the queues.

        Args:
            worker_id: The slot.
            incarnation: The process of that slot.
            max_queue_size: Experiences that may wait.
            newest_version: Tells the newest weights version, which no experience can exceed.
            newest_named: Tells, for the number of other weights, their name and newest version.

        Raises:
            OSError: There are no descriptors left; nothing is left open.
        """
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.is_greeted = False
        with contextlib.ExitStack() as undo:
            theirs, self.experience = _pair(0 if max_queue_size else None, undo, manual=True)
            self.model, model = _pair(UNREAD, undo)
            self.control, control = _pair(None, undo)
            reply, self.reply = _pair(None, undo, manual=True)
            self.status = StatusLine()
            undo.pop_all()
        self._theirs: WorkerEndpoints | None = WorkerEndpoints(
            control, model, reply, theirs, self.status
        )
        self._announcer = Announcer(self.model, self._tell_work)
        self._requests = Requests(worker_id, incarnation)
        self._receiver = Receiver(
            self.experience,
            self.reply,
            BatchParser(worker_id, incarnation, newest_named),
            self._requests,
            newest_version,
        )
        self._lost: WorkerError | None = None
        self._unsent: deque[Any] = deque()
        self._sending: asyncio.Task[None] | None = None

    def endpoints(self) -> WorkerEndpoints:
        """Take the worker's ends out; they can be given away once."""
        theirs, self._theirs = self._theirs, None
        if theirs is None:
            raise QueueClosed("the worker's ends of these queues were given away before")
        return theirs

    def listen(self, owner: LineOwner) -> None:
        """Tell ``owner`` what the worker says, in the running loop."""
        self._receiver.listen(owner)

    # to the worker

    def send(self, message: Any) -> None:
        """Send a control frame behind those before it, as soon as there is room.

        Raises:
            QueueEnded: The worker no longer reads.
        """
        self._send(messages.pack(message))

    def _send(self, frame: Any) -> None:
        if not self._unsent:
            try:
                self.control.put_nowait(frame)
            except QueueWouldBlock:
                self._sending = asyncio.ensure_future(self._send_rest())
            else:
                return
        self._unsent.append(frame)

    async def _send_rest(self) -> None:
        with contextlib.suppress(QueueEnded, QueueClosed):
            while self._unsent:
                await self.control.put(self._unsent[0])
                self._unsent.popleft()
        self._unsent.clear()

    def try_to_send(self, message: Any) -> bool:
        """Send a control frame as ``send`` does; return whether the worker still reads."""
        try:
            self.send(message)
        except (QueueEnded, QueueClosed):
            return False
        self._tell_work()
        return True

    def grant(self, credits: int) -> None:
        """Allow the worker to collect ``credits`` more experiences."""
        if credits > 0 and self._lost is None:
            self._receiver.granted += credits
            self.experience.grant(credits)
            self._tell_work()

    async def ask(self, sequence: int, name: str, frame: Any, timeout: float) -> Any:
        """Send a packed control frame and wait for its answer.

        Safe to cancel: a late answer is dropped.

        Raises:
            CommandError: The worker answered with an error.
            CommandTimeout: It did not answer within ``timeout`` seconds.
            WorkerLost: It died before it answered.
        """
        if self._lost is not None:
            raise copy_of(self._lost)
        future = self._requests.open_command(sequence, name)
        # Not asyncio.timeout: this path is every command's, and a bare timer is a third of it.
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout, self._expire, future, name, timeout)
        self._tell_work()
        try:
            # The supervisor tells why a worker died, through the future.
            with contextlib.suppress(QueueEnded):
                self._send(frame)
            return await future
        finally:
            timer.cancel()
            self._requests.close_command(sequence)

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

    def announce(self, key: object, frame: Any, memory: Shared | None = None) -> None:
        """Send a packed frame about weights, in order and for sure; see ``Announcer.tell``."""
        self._announcer.tell(key, frame, memory)

    def greet(self, hello: messages.Hello, settings: messages.Configure | None = None) -> None:
        """Send the first frame, and the slot's settings, to a worker that is being started."""
        self.is_greeted = True
        self.send(hello)
        if settings is not None:
            self._receiver.settings_version = settings.version
            self.send(settings)

    def configure(self, version: int, frame: Any) -> asyncio.Future[None]:
        """Have the worker take settings; return a future of its answer.

        The future raises ``CommandError`` if the worker refuses them, ``WorkerLost`` if it dies.

        Args:
            version: Their version, higher than any before.
            frame: The packed ``Configure``.
        """
        future = self._requests.open_settings(version)
        if self._lost is not None:
            future.set_exception(copy_of(self._lost))
            return future
        self._receiver.settings_version = version
        with contextlib.suppress(QueueEnded, QueueClosed):  # the supervisor tells why it died
            self._send(frame)
        self._tell_work()
        return future

    def ask_for_version(self, number: int, version: int) -> asyncio.Future[int]:
        """Have the worker load weights; return a future of the version that it acknowledges.

        That is ``version`` or a newer one. The future raises ``WorkerLost`` if the worker dies.

        Args:
            number: Stands for the name of the weights.
            version: The version that it is to have.
        """
        future = self._requests.open_version(number, version)
        if self._lost is not None:
            future.set_exception(copy_of(self._lost))
        else:
            frame = messages.pack(messages.Announcement(number, version, acknowledge=True))
            self._announcer.ask(frame)
        return future

    def _tell_work(self) -> None:
        owner = self._receiver.owner
        if owner is not None:
            owner.on_work()

    @property
    def granted(self) -> int:
        """Experiences that the worker was allowed to collect so far."""
        return self._receiver.granted

    @property
    def received(self) -> int:
        """Experiences that have arrived."""
        return self._receiver.received

    @property
    def outstanding(self) -> int:
        """Experiences that the worker may collect or is collecting."""
        receiver = self._receiver  # read here, not through its property: this is every batch's path
        return receiver.granted - receiver.received

    @property
    def has_requests(self) -> bool:
        """Whether an answer, or the loading of weights, is awaited."""
        return bool(self._requests)

    @property
    def takes_weights(self) -> bool | None:
        """Whether the worker can load weights; ``None`` until it is ready."""
        return self._receiver.takes_weights

    @property
    def is_ready(self) -> bool:
        """Whether the worker has announced that its start is finished."""
        return self._receiver.takes_weights is not None

    @property
    def has_said_farewell(self) -> bool:
        """Whether the worker has announced its end: a goodbye, or a hook that raised."""
        return self._receiver.goodbye is not None or self._receiver.failed is not None

    @property
    def phase(self) -> Phase:
        """What the worker says it is doing."""
        return self.status.phase

    # its end

    async def read_arrived(self) -> None:
        """Deliver every experience that the worker has sent up to this moment."""
        await self._receiver.read_arrived()

    async def read_to_the_end(self) -> None:
        """Deliver everything that the worker has sent; call it once its process has ended."""
        await self._receiver.read_to_the_end()

    def last_words(self) -> LastWords:
        """Return what the worker left behind; ``read_to_the_end`` comes before."""
        status = self.status
        failed, goodbye = self._receiver.failed, self._receiver.goodbye
        return LastWords(
            said_goodbye=goodbye is not None,
            recycle=goodbye.recycle if goodbye is not None else "",
            failure=failed.message if failed is not None else "",
            traceback=failed.traceback if failed is not None else None,
            phase=failed.phase if failed is not None else status.phase.name.lower(),
            delivered=self.received,
            version=status.version,
            experiences_lost=max(0, status.begun - self.received),
            commands_lost=self._requests.num_unanswered,
            last_command=self._requests.name_of(status.command),
            rss=status.rss,
            suspected=status.suspected,
        )

    def lose(self, error: WorkerError) -> None:
        """Fail everybody who still waits for this incarnation, and close the queues.

        Batches that were delivered stay valid. Again has no effect.
        """
        if self._lost is None:
            self._lost = error
            self._receiver.close()
            self._announcer.close()
            self.model.close()
            self.control.close()
            if self._theirs is not None:
                self._theirs.close()
            self.status.close()
            self._requests.fail(error)


def _pair(
    credit: int | None, undo: contextlib.ExitStack, *, manual: bool = False
) -> tuple[FrameWriter, FrameReader]:
    """Make a queue's two ends, which ``undo`` closes."""
    near, far = socket.socketpair()
    writer = FrameWriter(near, credit)
    reader = FrameReader(far, "manual" if manual else "each")
    undo.callback(writer.close)
    undo.callback(reader.close)
    return writer, reader


__all__ = ["Line"]
