"""Async queues between two processes: whole frames, awaitable deadlines, credits for a bound.

A queue is one socket pair with one writer and one reader, and no lock that a killed process
could hold. Frames go one way. The other way goes nothing but credits: how many frames the
reader is ready for, which is how a queue is bounded and how its length is known.
"""

from __future__ import annotations

import socket
from typing import Generic, TypeVar

from keisei.exceptions import QueueClosed, QueueError
from keisei.ipc import serialize
from keisei.ipc.frame_reader import Frame, FrameReader
from keisei.ipc.frame_writer import FrameWriter
from keisei.naming import public

T = TypeVar("T")


@public
class AsyncQueue(Generic[T]):
    """A queue of picklable values from one process to another, or inside one.

    A new queue has both ends. Hand one of them to the other process with ``detach_writer`` or
    ``detach_reader`` and build it there with ``from_writer`` or ``from_reader``. Each end belongs
    to one process and one event loop; any number of its tasks may wait.
    """

    def __init__(self, maxsize: int = 0, *, manual: bool = False) -> None:
        """Make a queue for ``maxsize`` values that were not taken yet.

        Args:
            maxsize: The bound; 0 leaves it to the operating system's buffers, which take some
                hundred small values.
            manual: Taking a value tells the writer nothing. One of a bounded queue sends nothing
                but on credits that the reader grants (``reader.grant``).

        Raises:
            ValueError: ``maxsize`` is negative.
        """
        self.maxsize = _checked(maxsize)
        near, far = socket.socketpair()
        credit = 0 if manual and maxsize else maxsize or None
        self.writer: FrameWriter | None = FrameWriter(near, credit)
        self.reader: FrameReader | None = FrameReader(far, "manual" if manual else "each")

    @classmethod
    def from_writer(cls, fd: int, maxsize: int = 0) -> AsyncQueue[T]:
        """Build the sending end around a descriptor from ``detach_writer``."""
        credit = _checked(maxsize) or None
        return cls._from_ends(maxsize, FrameWriter(socket.socket(fileno=fd), credit), None)

    @classmethod
    def from_reader(cls, fd: int, maxsize: int = 0) -> AsyncQueue[T]:
        """Build the receiving end around a descriptor from ``detach_reader``."""
        return cls._from_ends(_checked(maxsize), None, FrameReader(socket.socket(fileno=fd)))

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
        """Give the sending end away, unused; the caller owns the descriptor."""
        return self.take_writer().detach()

    def detach_reader(self) -> int:
        """Give the receiving end away, unused; the caller owns the descriptor.

        What was put before is received there.
        """
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
    def _value(frame: Frame) -> T:
        payload, fds = frame
        fds.close()  # nothing here could own them
        value: T = serialize.loads(payload, "the item")
        return value

    def qsize(self) -> int:
        """Return how many items were not taken yet.

        A process that has the sending end alone knows what the reader has told it, which is at
        most a turn of the reader's loop late; with the receiving end alone, what has arrived.
        """
        reader, writer = self.reader, self.writer
        if reader is not None and writer is not None and not writer.closed:
            return writer.sent - reader.taken
        if reader is not None:
            return reader.qsize()
        return writer.qsize() if writer is not None else 0

    def close(self) -> None:
        """Close the ends that this process has; tasks that wait get ``QueueClosed``.

        An item that was put, but is too large to be on its way already, is lost.
        """
        if self.writer is not None:
            self.writer.close()
        if self.reader is not None:
            self.reader.close()

    async def aclose(self) -> None:
        """Send what was put to the other process, then close the ends that this process has.

        Tasks that wait get ``QueueClosed``. When cancelled the ends are closed at once, as by
        ``close``; so they are when the reader has gone.
        """
        try:
            if self.writer is not None and self.reader is None:
                await self.writer.flush()
        except QueueError:
            pass
        finally:
            self.close()


def _checked(maxsize: int) -> int:
    if maxsize < 0:
        raise ValueError(f"maxsize is {maxsize}; give the bound, or 0 for none")
    return maxsize


__all__ = ["AsyncQueue", "FrameReader", "FrameWriter"]
