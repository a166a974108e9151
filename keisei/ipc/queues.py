"""Async queues between two processes: whole frames, awaitable deadlines, credits for a bound.

A queue is one socket pair with one writer and one reader, and no lock that a killed process
could hold. Frames go one way. The other way goes nothing but credits: how many frames the
reader is ready for, which is how a queue is bounded and how its length is known.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

from keisei.exceptions import (
    QueueBroken,
    QueueClosed,
    QueueEnded,
    QueueError,
    QueueTimeout,
    QueueWouldBlock,
)
from keisei.ipc import serialize

T = TypeVar("T")
Acknowledge = Literal["each", "batch", "manual"]

_HEADER = struct.Struct("<Q")
_LENGTH_BITS = 56
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_CREDIT = struct.Struct("<I")
_CHUNK = 1 << 16
_SHARE = 1 << 20
_MAX_FDS = 4
_FD_SPACE = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
_RECV_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class _Waiters:
    """Tasks that wait for one direction of one descriptor.

    The descriptor is watched from the first wait on and left watched between waits; an event
    that finds nobody waiting, and nothing left to do, ends the watch. So a busy queue makes no
    ``epoll_ctl`` calls.
    """

    def __init__(self, fd: int, *, writing: bool, wake: Callable[[], bool]) -> None:
        """Watch ``fd``; ``wake`` does what is due and tells whether more is left to do."""
        self._fd = fd
        self._writing = writing
        self._wake = wake
        self._loop: asyncio.AbstractEventLoop | None = None
        self._futures: set[asyncio.Future[bool]] = set()

    async def wait(self, deadline: float | None) -> bool:
        """Return whether something happened before ``deadline`` (loop time)."""
        loop = self.watch()
        future: asyncio.Future[bool] = loop.create_future()
        self._futures.add(future)
        timer = None if deadline is None else loop.call_at(deadline, _settle, future, False)
        try:
            return await future
        finally:
            self._futures.discard(future)
            if timer is not None:
                timer.cancel()

    def watch(self) -> asyncio.AbstractEventLoop:
        """Watch the descriptor in the running loop, which is returned."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self.stop()
            self._loop = loop
            (loop.add_writer if self._writing else loop.add_reader)(self._fd, self._ready)
        return loop

    def _ready(self) -> None:
        try:
            busy = bool(self._futures) | self._wake()
        except QueueError:
            busy = bool(self._futures)  # whoever waits calls again and meets the error itself
        if not busy:
            self.stop()
        self.notify()

    def notify(self) -> None:
        """Let every waiter look again."""
        for future in self._futures:
            _settle(future, True)

    def stop(self) -> None:
        if self._loop is not None:
            if not self._loop.is_closed():
                (self._loop.remove_writer if self._writing else self._loop.remove_reader)(self._fd)
            self._loop = None
        self.notify()


def _settle(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


class FrameWriter:
    """The sending end: one process, one event loop, whole frames in order.

    Attributes:
        sent: Frames accepted so far.
        acknowledged: Frames that the reader has taken, or credits that it has granted.
    """

    def __init__(self, sock: socket.socket, credit: int | None) -> None:
        """Take ``sock`` over; ``credit`` frames may be sent at first, ``None`` sets no bound."""
        sock.setblocking(False)
        self._sock = sock
        self._bound = credit
        self._unsent: deque[memoryview] = deque()
        self._partial = b""
        self._closed = False
        self.sent = 0
        self.acknowledged = 0
        self._credited = _Waiters(sock.fileno(), writing=False, wake=self._refill)
        self._drained = _Waiters(sock.fileno(), writing=True, wake=self._flush)

    @property
    def credit(self) -> int | None:
        """Frames that may be sent now, without reading new credits; ``None`` is no bound."""
        return None if self._bound is None else self._bound + self.acknowledged - self.sent

    def refresh(self) -> int | None:
        """Read the credits that have arrived and return ``credit``."""
        self._refill()
        return self.credit

    def put_nowait(self, payload: bytes | memoryview, fds: Sequence[int] = ()) -> None:
        """Send one frame, with copies of ``fds``, or nothing at all.

        What the operating system does not take at once is sent by the running loop.

        Raises:
            QueueWouldBlock: The queue is full, or the frame before is still on its way.
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed.
        """
        if self._closed:
            raise QueueClosed("put on a queue whose writing end was closed")
        if self._unsent:
            self._flush()
            if self._unsent:
                raise QueueWouldBlock("the frame before is still on its way")
        if self._bound is not None and self.credit == 0 and self.refresh() == 0:
            raise QueueWouldBlock("the queue is full")
        header = _HEADER.pack(len(payload) | len(fds) << _LENGTH_BITS)
        try:
            if fds:
                done = socket.send_fds(self._sock, [header, payload], list(fds))
            else:
                done = self._sock.sendmsg((header, payload))
        except BlockingIOError:
            raise QueueWouldBlock("the queue's buffer is full") from None
        except OSError as error:
            raise QueueEnded(f"the reading end is closed ({error.strerror})") from error
        self.sent += 1
        if done < len(header) + len(payload):
            rest = [memoryview(header)[done:]] if done < len(header) else []
            rest.append(memoryview(payload)[max(0, done - len(header)) :])
            self._unsent.extend(part for part in rest if part)
            self._drained.watch()

    async def put(
        self, payload: bytes | memoryview, *, fds: Sequence[int] = (), timeout: float | None = None
    ) -> None:
        """Send one frame as soon as there is room; do not alter ``payload`` afterwards.

        Safe to cancel: the frame is either accepted whole or not at all.

        Raises:
            QueueTimeout: There was no room in ``timeout`` seconds; nothing was sent.
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed.
        """
        deadline = _deadline(timeout)
        while True:
            try:
                return self.put_nowait(payload, fds)
            except QueueWouldBlock:
                full = self._bound is not None and self.credit == 0
                waiters = self._credited if full and not self._unsent else self._drained
            if not await waiters.wait(deadline):
                raise QueueTimeout(f"no room in the queue for {timeout} s")

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until the operating system has every byte that was put.

        Safe to cancel: the rest is sent by the next call.

        Raises:
            QueueTimeout: The reader did not make room in time.
            QueueEnded: The reader is gone.
        """
        deadline = _deadline(timeout)
        while self._unsent:
            self._flush()
            if self._unsent and not await self._drained.wait(deadline):
                raise QueueTimeout(f"the reader made no room for {timeout} s")

    def _flush(self) -> bool:
        while self._unsent:
            try:
                done = self._sock.send(self._unsent[0])
            except BlockingIOError:
                return True
            except OSError as error:
                self._unsent.clear()
                raise QueueEnded(f"the reading end is closed ({error.strerror})") from error
            if done == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][done:]
        return False

    def _refill(self) -> bool:
        while True:
            try:
                data = self._sock.recv(4096)
            except BlockingIOError:
                return False
            except OSError as error:
                raise QueueEnded(f"the reading end is closed ({error.strerror})") from error
            if not data:
                raise QueueEnded("the reading end is closed")
            data = self._partial + data
            whole = len(data) - len(data) % _CREDIT.size
            self._partial = data[whole:]
            self.acknowledged += sum(n for (n,) in _CREDIT.iter_unpack(data[:whole]))

    def qsize(self) -> int:
        """Return how many frames the reader has not taken yet (acknowledging queues only)."""
        try:
            self._refill()
        except QueueEnded:
            return 0
        return self.sent - self.acknowledged

    def watch_credit(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` in the running loop whenever credits arrive or the reader goes."""
        asyncio.get_running_loop().add_reader(self._sock.fileno(), wake)

    def detach(self) -> int:
        """Give the descriptor away, to another process; this object is closed."""
        self._release()
        return self._sock.detach()

    def close(self) -> None:
        """Close this end; the reader reads what was sent and then the end."""
        if not self._closed:
            self._release()
            self._sock.close()

    def _release(self) -> None:
        self._closed = True
        self._unsent.clear()
        self._credited.stop()
        self._drained.stop()


class FrameReader:
    """The receiving end: one process, one event loop.

    A frame is a ``bytearray`` of its own and the descriptors that came with it, which the
    receiver of the frame owns.
    """

    def __init__(self, sock: socket.socket, acknowledge: Acknowledge = "each") -> None:
        """Take ``sock`` over.

        Args:
            sock: One end of a socket pair.
            acknowledge: "each" grants one credit for each frame taken; "batch" grants them
                when nothing is left to take, for a writer without a bound; with "manual" the
                owner grants credits by itself.
        """
        sock.setblocking(False)
        self._sock = sock
        self._acknowledge = acknowledge
        self._owed = 0
        self._frames: deque[tuple[bytearray, list[int]]] = deque()
        self._fds: deque[int] = deque()
        self._head = bytearray()
        self._body: bytearray | None = None
        self._body_filled = 0
        self._body_fds = 0
        self._end: QueueError | None = None
        self._closed = False
        self._arrived = _Waiters(sock.fileno(), writing=False, wake=self._wake)
        self._listener: asyncio.AbstractEventLoop | None = None

    @property
    def ended(self) -> QueueError | None:
        """Why no more frames will arrive, or ``None``."""
        return self._end

    def get_nowait(self) -> tuple[bytearray, list[int]]:
        """Take the next frame.

        Raises:
            QueueWouldBlock: No whole frame is here.
            QueueEnded: The writer closed its end after its last frame.
            QueueBroken: The writer died in the middle of a frame.
            QueueClosed: This end was closed.
        """
        if self._closed:
            raise QueueClosed("get on a queue whose reading end was closed")
        if not self._frames:
            self.pump()
        if self._frames:
            frame = self._frames.popleft()
            if self._acknowledge != "manual":
                self._owed += 1
                if self._acknowledge == "each" or not self._frames:
                    self.grant(0)
            return frame
        if self._end is not None:
            raise type(self._end)(*self._end.args)
        raise QueueWouldBlock("the queue is empty")

    async def get(self, timeout: float | None = None) -> tuple[bytearray, list[int]]:
        """Wait for the next frame.

        Safe to cancel: a frame is either returned or stays in the queue.

        Raises:
            QueueTimeout: No frame arrived in ``timeout`` seconds; the queue stays usable.
            QueueEnded: The writer closed its end after its last frame.
            QueueBroken: The writer died in the middle of a frame.
            QueueClosed: This end was closed.
        """
        deadline = _deadline(timeout)
        while True:
            try:
                return self.get_nowait()
            except QueueWouldBlock:
                pass
            if not await self._arrived.wait(deadline):
                raise QueueTimeout(f"nothing arrived in the queue for {timeout} s")

    def grant(self, credits: int) -> None:
        """Let the writer send ``credits`` more frames; what cannot be told now is told later."""
        self._owed += credits
        if not self._owed:
            return
        try:
            self._sock.send(_CREDIT.pack(self._owed))
        except BlockingIOError:
            return
        except OSError:
            pass  # the writer is gone; reading to the end tells so
        self._owed = 0

    def _wake(self) -> bool:
        self.pump()
        return False

    def drain(self) -> None:
        """Read all that a writer, which is dead by now, has left."""
        while self._end is None and not self.pump():
            pass

    def pump(self) -> bool:
        """Read what has arrived, up to a share that keeps the loop responsive.

        Returns:
            Whether everything was read: nothing more has arrived.
        """
        share = _SHARE
        while self._end is None and share > 0:
            try:
                if self._body is not None and len(self._body) - self._body_filled > _CHUNK:
                    rest = memoryview(self._body)[self._body_filled :]
                    count, fds = self._sock.recv_into(rest), b""
                    data = None
                else:
                    data, ancillary, _, _ = self._sock.recvmsg(_CHUNK, _FD_SPACE, _RECV_FLAGS)
                    count = len(data)
                    for level, kind, fds in ancillary:
                        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                            received = array.array("i")
                            received.frombytes(fds[: len(fds) - len(fds) % received.itemsize])
                            self._fds.extend(received)
            except BlockingIOError:
                return True
            except OSError:
                count, data = 0, b""
            share -= count
            if count == 0:
                self._finish()
            elif data is None:
                self._body_filled += count
                self._complete()
            else:
                self._parse(memoryview(data))
        return self._end is not None

    def _parse(self, data: memoryview) -> None:
        while data or self._body is not None:
            if self._body is None:
                take = _HEADER.size - len(self._head)
                self._head += data[:take]
                data = data[take:]
                if len(self._head) < _HEADER.size:
                    return
                (head,) = _HEADER.unpack(self._head)
                self._head.clear()
                self._body = bytearray(head & _LENGTH_MASK)
                self._body_filled = 0
                self._body_fds = head >> _LENGTH_BITS
            part = data[: len(self._body) - self._body_filled]
            self._body[self._body_filled : self._body_filled + len(part)] = part
            self._body_filled += len(part)
            data = data[len(part) :]
            if not self._complete():
                return

    def _complete(self) -> bool:
        if self._body is None or self._body_filled < len(self._body):
            return False
        fds = [self._fds.popleft() for _ in range(min(self._body_fds, len(self._fds)))]
        self._frames.append((self._body, fds))
        self._body = None
        return True

    def _finish(self) -> None:
        if self._body is not None or self._head:
            self._end = QueueBroken("the writer died in the middle of a frame")
        else:
            self._end = QueueEnded("the writer closed its end after its last frame")

    def qsize(self) -> int:
        """Return how many whole frames have arrived and were not taken."""
        if not self._closed:
            self.pump()
        return len(self._frames)

    def listen(self, on_arrival: Callable[[], None]) -> None:
        """Call ``on_arrival`` in the running loop after anything arrived, and once at the end.

        The callee takes frames with ``get_nowait`` until it raises. For the supervisor, which
        has no task to wake for each frame; ``get`` must not be used beside it.
        """
        self._listener = asyncio.get_running_loop()

        def readable() -> None:
            self.pump()
            if self._end is not None:
                self._silence()
            on_arrival()

        self._listener.add_reader(self._sock.fileno(), readable)

    def _silence(self) -> None:
        if self._listener is not None:
            if not self._listener.is_closed():
                self._listener.remove_reader(self._sock.fileno())
            self._listener = None

    def detach(self) -> int:
        """Give the descriptor away, to another process; this object is closed."""
        self._release()
        return self._sock.detach()

    def close(self) -> None:
        """Close this end and everything that was received but not taken."""
        if not self._closed:
            self._release()
            self._sock.close()

    def _release(self) -> None:
        self._closed = True
        self._silence()
        self._arrived.stop()
        for _, fds in self._frames:
            self._fds.extend(fds)
        self._frames.clear()
        while self._fds:
            os.close(self._fds.popleft())


class AsyncQueue(Generic[T]):
    """A queue of picklable values from one process to another, or inside one.

    A new queue has both ends. Hand one of them to the other process with ``detach_writer`` or
    ``detach_reader`` and build it there with ``from_writer`` or ``from_reader``. Each end belongs
    to one process and one event loop; any number of its tasks may wait.
    """

    def __init__(self, maxsize: int = 0, *, manual: bool = False) -> None:
        """Make a queue for ``maxsize`` values that nobody took yet; 0 sets no bound.

        Args:
            maxsize: The bound.
            manual: Send nothing but on credits that the reader grants (``reader.grant``).
        """
        near, far = socket.socketpair()
        self.maxsize = maxsize
        credit = 0 if manual else maxsize or None
        acknowledge: Acknowledge = "manual" if manual else "each" if maxsize else "batch"
        self.writer: FrameWriter | None = FrameWriter(near, credit)
        self.reader: FrameReader | None = FrameReader(far, acknowledge)

    @classmethod
    def from_writer(cls, fd: int, maxsize: int = 0) -> AsyncQueue[T]:
        """Build the sending end around a descriptor from ``detach_writer``."""
        return cls._from_ends(maxsize, FrameWriter(socket.socket(fileno=fd), maxsize or None), None)

    @classmethod
    def from_reader(cls, fd: int, maxsize: int = 0) -> AsyncQueue[T]:
        """Build the receiving end around a descriptor from ``detach_reader``."""
        reader = FrameReader(socket.socket(fileno=fd), "each" if maxsize else "batch")
        return cls._from_ends(maxsize, None, reader)

    @classmethod
    def _from_ends(
        cls, maxsize: int, writer: FrameWriter | None, reader: FrameReader | None
    ) -> AsyncQueue[T]:
        queue = cls.__new__(cls)
        queue.maxsize = maxsize
        queue.writer = writer
        queue.reader = reader
        return queue

    def take_writer(self) -> FrameWriter:
        """Give the sending end away, inside this process."""
        end, self.writer = self._writing_end(), None
        return end

    def take_reader(self) -> FrameReader:
        """Give the receiving end away, inside this process."""
        end, self.reader = self._reading_end(), None
        return end

    def detach_writer(self) -> int:
        """Give the sending end away; the caller owns the descriptor."""
        return self.take_writer().detach()

    def detach_reader(self) -> int:
        """Give the receiving end away; the caller owns the descriptor."""
        return self.take_reader().detach()

    def _writing_end(self) -> FrameWriter:
        if self.writer is None:
            raise QueueClosed("this queue's writing end is in another process")
        return self.writer

    def _reading_end(self) -> FrameReader:
        if self.reader is None:
            raise QueueClosed("this queue's reading end is in another process")
        return self.reader

    async def put(self, item: T, timeout: float | None = None) -> None:
        """Add ``item``; wait up to ``timeout`` seconds for room, ``None`` without end.

        Safe to cancel: the item is either queued or not.

        Raises:
            SerializationError: ``item`` cannot be pickled; nothing was queued.
            QueueTimeout: There was no room in time.
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed, or is in another process.
        """
        await self._writing_end().put(serialize.dumps(item, "the item"), timeout=timeout)

    def put_nowait(self, item: T) -> None:
        """Add ``item`` at once, or raise ``QueueWouldBlock``; else as ``put``."""
        self._writing_end().put_nowait(serialize.dumps(item, "the item"))

    async def get(self, timeout: float | None = None) -> T:
        """Take the oldest item; wait up to ``timeout`` seconds for one, ``None`` without end.

        Safe to cancel: an item is either returned or stays in the queue.

        Raises:
            QueueTimeout: Nothing arrived in time.
            QueueEnded: The writer closed its end and everything was taken.
            QueueBroken: The writer died in the middle of an item, which is discarded.
            QueueClosed: This end was closed, or is in another process.
            SerializationError: The item cannot be rebuilt here; it is taken.
        """
        return self._value(await self._reading_end().get(timeout))

    def get_nowait(self) -> T:
        """Take the oldest item at once, or raise ``QueueWouldBlock``; else as ``get``."""
        return self._value(self._reading_end().get_nowait())

    @staticmethod
    def _value(frame: tuple[bytearray, list[int]]) -> Any:
        return serialize.loads(frame[0], "the item")

    def qsize(self) -> int:
        """Return how many items nobody took yet, as far as this process can know."""
        if self.reader is not None:
            return self.reader.qsize()
        return self.writer.qsize() if self.writer is not None else 0

    def close(self) -> None:
        """Close the ends that this process has."""
        if self.writer is not None:
            self.writer.close()
        if self.reader is not None:
            self.reader.close()

    async def aclose(self) -> None:
        """Close the ends that this process has; tasks that wait get ``QueueClosed``."""
        self.close()
