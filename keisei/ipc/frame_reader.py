"""The receiving end of a queue between two processes: whole frames, and credits back."""

from __future__ import annotations

import array
import asyncio
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Literal

from keisei.exceptions import (
    QueueBroken,
    QueueClosed,
    QueueEnded,
    QueueError,
    QueueTimeout,
    QueueWouldBlock,
)
from keisei.ipc import forks, wire
from keisei.ipc.descriptors import NO_DESCRIPTORS, Descriptors
from keisei.ipc.watch import Watch, deadline_after

Acknowledge = Literal["each", "manual"]

_INT = array.array("i").itemsize
_FD_SPACE = socket.CMSG_SPACE(wire.MAX_FDS * _INT)

Frame = tuple[memoryview, Descriptors]


class FrameReader:
    """The receiving end: one process, one event loop.

    A frame is a writable buffer of its own and the descriptors that came with it: those that the
    receiver of the frame does not claim are closed with it. A writer that sends descriptors beyond
    those that its frames name breaks the queue.

    Attributes:
        taken: Frames taken so far.
    """

    def __init__(self, sock: socket.socket, acknowledge: Acknowledge = "each") -> None:
        """Take ``sock`` over.

        Args:
            sock: One end of a socket pair.
            acknowledge: "each" grants one credit for each frame taken; with "manual" the owner
                grants credits by itself.
        """
        sock.setblocking(False)
        self._sock = sock
        self._acknowledge = acknowledge
        self._owed = 0
        self._frames: deque[Frame] = deque()
        self._fds: deque[int] = deque()
        self._head = bytearray()
        self._body: memoryview | None = None
        self._body_fds = NO_DESCRIPTORS
        self._filled = 0
        self._end: QueueError | None = None
        self._closed = False
        self._hearing = False
        self.taken = 0
        self._arrived = Watch(sock.fileno(), writing=False, work=self._arrive)
        self._tellable = Watch(sock.fileno(), writing=True, work=self._tell)
        forks.own(self)

    def fileno(self) -> int:
        """Return the descriptor, which stays this end's."""
        return self._sock.fileno()

    @property
    def has_news(self) -> bool:
        """Whether a frame, or the end, was received and not taken; makes no system call."""
        return bool(self._frames) or self._end is not None

    @property
    def ended(self) -> QueueError | None:
        """Why no more frames will arrive, or ``None``."""
        return self._end

    def get_nowait(self) -> Frame:
        """Take the next frame.

        Raises:
            QueueWouldBlock: No whole frame is here.
            QueueEnded: The writer closed its end after its last frame.
            QueueBroken: The writer died in the middle of a frame, or this process could not
                receive one.
            QueueClosed: This end was closed.
        """
        frame = self.pop()
        if frame is None:
            raise QueueWouldBlock("the queue is empty")
        return frame

    def pop(self) -> Frame | None:
        """Take the next frame as ``get_nowait`` does; ``None`` if no whole one is here."""
        if self._closed:
            raise QueueClosed("get on a queue whose reading end was closed")
        if not self._frames and not self._hearing:
            self.pump()
        if self._frames:
            frame = self._frames.popleft()
            self.taken += 1
            if self._acknowledge == "each":
                self._owed += 1
                if not self._hearing:
                    self.grant(0)
            return frame
        if self._end is not None:
            raise type(self._end)(*self._end.args)
        return None

    async def get(self, timeout: float | None = None) -> Frame:
        """Wait for the next frame.

        Safe to cancel: a frame is either returned or stays in the queue.

        Raises:
            QueueTimeout: No frame arrived in ``timeout`` seconds; the queue stays usable.
            QueueEnded: The writer closed its end after its last frame.
            QueueBroken: The writer died in the middle of a frame, or this process could not
                receive one.
            QueueClosed: This end was closed.
        """
        deadline = deadline_after(timeout)
        while True:
            frame = self.pop()
            if frame is not None:
                return frame
            if not await self._arrived.wait(deadline):
                raise QueueTimeout(f"nothing arrived in the queue for {timeout} s")

    def listen(self, on_arrival: Callable[[], None]) -> None:
        """Call ``on_arrival`` in the running loop when frames are here, and once at the end.

        The callee takes frames with ``get_nowait`` until it raises. For those who have no task to
        wake for each frame.
        """

        def heard() -> None:
            if self._closed or not (self._frames or self._end is not None):
                return
            # Frames that came since belong to the next event, so that the loop turns. One message
            # of credits is enough for all frames that are taken now.
            self._hearing = True
            try:
                on_arrival()
            finally:
                self._hearing = False
                self.grant(0)

        if self._end is None:
            self._arrived.listen(heard)
        if self._frames or self._end is not None:
            asyncio.get_running_loop().call_soon(heard)

    def rest(self, until: float) -> None:
        """Tell a listener and waiting tasks nothing until then (loop time), then all at once."""
        self._arrived.rest(until)

    def grant(self, credits: int) -> None:
        """Let the writer send ``credits`` more frames; the message may be sent later."""
        self._owed += credits
        if self._tell():
            self._tellable.begin()

    def _tell(self) -> bool:
        """Send the writer the credits that it is owed; return whether that must wait."""
        if self._owed and not self._closed:
            try:
                self._sock.send(wire.CREDIT.pack(self._owed), wire.SEND_FLAGS)
            except BlockingIOError:
                return True
            except OSError:
                pass  # the writer is gone; reading to the end tells so
        self._owed = 0
        return False

    def drain(self) -> None:
        """Read all that a dead writer has left."""
        while self._end is None and self._receive(wire.SHARE)[0]:
            pass

    def pump(self) -> bool:
        """Read all that has arrived, up to a share that keeps the loop responsive.

        Returns:
            Whether everything was read: nothing more has arrived.
        """
        share = wire.SHARE
        while share > 0 and self._end is None:
            count, is_cut = self._receive(max(share, wire.CHUNK))
            share -= count
            if count < wire.CHUNK and not is_cut:
                return True
        return self._end is not None

    def _arrive(self) -> bool:
        self.pump()
        if self._end is not None:
            self._arrived.stop()  # there would be no end of events
        return False

    def _receive(self, limit: int) -> tuple[int, bool]:
        """Read once.

        Returns:
            How many bytes came, and whether descriptors may have cut the reading short.
        """
        body, data, is_cut = self._body, b"", False
        try:
            if body is not None and len(body) - self._filled > wire.CHUNK:
                count = self._sock.recv_into(body[self._filled :][:limit])
                self._filled += count
            else:
                data, ancillary, _, _ = self._sock.recvmsg(wire.CHUNK, _FD_SPACE, wire.RECV_FLAGS)
                count, is_cut = len(data), bool(ancillary)
                for level, kind, rights in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        self._fds.extend(array.array("i", rights[: len(rights) // _INT * _INT]))
        except BlockingIOError:
            return 0, False
        except OSError:
            count = 0  # reset by a writer that had not read its credits
        if count == 0:
            self._finish()
        elif data:
            self._parse(memoryview(data))
            if self._fds:
                self._check_unnamed()
        else:
            self._complete()
        return count, is_cut

    def _check_unnamed(self) -> None:
        """Look at descriptors that no frame has named when what came with them is parsed.

        They may wait for the rest of a header, for nothing else: they come with the last bytes of
        what one call receives, and with the first byte of their frame.
        """
        if not self._head or len(self._fds) > wire.MAX_FDS:
            self._break("the writer sent descriptors that no frame names")

    def _break(self, why: str) -> None:
        """Take no more from this writer."""
        self._end = self._end or QueueBroken(why)
        while self._fds:
            os.close(self._fds.popleft())

    def _parse(self, data: memoryview) -> None:
        if self._body is None and not self._head:
            data = data[self._take_whole(data) :]
        while data and self._end is None:
            if self._body is None:
                take = wire.HEADER.size - len(self._head)
                self._head += data[:take]
                data = data[take:]
                if len(self._head) < wire.HEADER.size:
                    return
                (head,) = wire.HEADER.unpack(self._head)
                self._head.clear()
                self._begin(head & wire.LENGTH_MASK, head >> wire.LENGTH_BITS)
            else:
                part = data[: len(self._body) - self._filled]
                self._body[self._filled : self._filled + len(part)] = part
                self._filled += len(part)
                data = data[len(part) :]
                self._complete()

    def _take_whole(self, data: memoryview) -> int:
        """Take the frames at the beginning of ``data`` that are whole and came without descriptors.

        Nearly all do. Returns the bytes taken.
        """
        at, size = 0, len(data)
        while at + wire.HEADER.size <= size:
            (head,) = wire.HEADER.unpack_from(data, at)
            end = at + wire.HEADER.size + head  # beyond any end where descriptors are counted
            if end > size:
                break
            body = bytearray(data[at + wire.HEADER.size : end])
            self._frames.append((memoryview(body), NO_DESCRIPTORS))
            at = end
        return at

    def _begin(self, nbytes: int, num_fds: int) -> None:
        """Begin a frame; its descriptors came with its first byte."""
        if num_fds > len(self._fds):
            self._break("descriptors were lost on the way: too many are open here")
            return
        try:
            body = bytearray(nbytes) if nbytes <= wire.SHARE else _lazy(nbytes)
        except (MemoryError, OSError, OverflowError):
            self._break(f"there is no memory for a frame of {nbytes} bytes")
            return
        self._body = memoryview(body)
        if num_fds:
            self._body_fds = Descriptors(self._fds.popleft() for _ in range(num_fds))
        self._filled = 0
        self._complete()

    def _complete(self) -> None:
        if self._body is not None and self._filled == len(self._body):
            self._frames.append((self._body, self._body_fds))
            self._body, self._body_fds = None, NO_DESCRIPTORS

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

    def detach(self) -> int:
        """Give the descriptor away, to another process; this object is closed.

        Raises:
            QueueError: Something was read here, which the new owner would miss.
        """
        if self.taken or self._frames or self._body is not None or self._head:
            raise QueueError("a reading end that was used cannot be given to another process")
        self._release()
        return self._sock.detach()

    def close(self) -> None:
        """Close this end and everything that was received but not taken."""
        if not self._closed:
            self._release()
            self._sock.close()

    def _release(self) -> None:
        self._closed = True
        self._arrived.close()
        self._tellable.close()
        for _, fds in self._frames:
            fds.close()
        self._frames.clear()
        self._body_fds.close()
        self._body, self._body_fds = None, NO_DESCRIPTORS
        while self._fds:
            os.close(self._fds.popleft())

    def disown(self) -> None:
        """Close a forked child's copy of this end; the parent's queue goes on unnoticed."""
        self._arrived.disown()
        self._tellable.disown()
        self.close()


def _lazy(nbytes: int) -> mmap.mmap:
    """Return room for a large frame, whose pages come into being as they are filled.

    So a header that claims more than ever arrives costs addresses and no memory. A large bytearray
    would be cleared at once, besides, for longer than a loop may wait.
    """
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
