"""The sending end of a queue between two processes: whole frames, as far as credits go."""

from __future__ import annotations

import array
import itertools
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from keisei.exceptions import QueueClosed, QueueEnded, QueueError, QueueTimeout, QueueWouldBlock
from keisei.ipc import forks, wire
from keisei.ipc.watch import Watch, deadline_after

_CREDITS_AT_ONCE = 1024
_UNHEARD = 64


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
        self._ended: QueueEnded | None = None
        self._closed = False
        self.sent = 0
        self.acknowledged = 0
        self._credited = Watch(sock.fileno(), writing=False, work=self._hear)
        self._drained = Watch(sock.fileno(), writing=True, work=self._flush)
        forks.own(self)

    @property
    def credit(self) -> int | None:
        """Frames that may be sent now, without reading new credits; ``None`` is no bound."""
        return None if self._bound is None else self._bound + self.acknowledged - self.sent

    def fileno(self) -> int:
        """Return the descriptor, which stays this end's."""
        return self._sock.fileno()

    @property
    def is_sending(self) -> bool:
        """Whether bytes that were put wait for the operating system to take them."""
        return bool(self._unsent)

    @property
    def closed(self) -> bool:
        """Whether this end was closed or given away."""
        return self._closed

    def refresh(self) -> int | None:
        """Read the credits that have arrived and return ``credit``.

        Raises:
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed.
        """
        if not self._closed:
            self._refill()
        self._check()
        return self.credit

    def put_nowait(self, payload: wire.Payload, fds: Sequence[int] = ()) -> None:
        """Send one frame, with copies of ``fds``, or nothing at all.

        What the operating system does not take at once is sent by the running loop, in shares and
        without a copy, so do not alter ``payload`` afterwards.

        Raises:
            QueueWouldBlock: The queue is full; or the operating system's buffer is, and nothing
                may wait here for it: a frame with descriptors, or one of a queue without a bound.
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed.
            OSError: ``fds`` cannot be passed.
            ValueError: ``fds`` are too many for one frame.
        """
        self._check()
        if self._unsent:
            self._flush()
        is_full = self._bound is not None and self._bound + self.acknowledged == self.sent
        # Credits of a queue without a bound serve nothing, but they must not pile up.
        if is_full or (self._bound is None and self.sent % _UNHEARD == _UNHEARD - 1):
            self._refill()
            is_full = self.credit == 0
        if self._ended is not None:
            self._check()
        if is_full:
            raise QueueWouldBlock("the queue is full")
        if len(fds) > wire.MAX_FDS:
            raise ValueError(f"a frame carries up to {wire.MAX_FDS} descriptors, not {len(fds)}")
        size = len(payload) if isinstance(payload, bytes) else wire.nbytes_of(payload)
        header = wire.HEADER.pack(size | len(fds) << wire.LENGTH_BITS)
        parts = (header, *payload) if isinstance(payload, tuple) else (header, payload)
        is_small = size <= wire.SHARE and len(parts) <= wire.MAX_PARTS
        first = parts if is_small else _share_of(parts, wire.HEADER.size + wire.SHARE)
        done = 0 if self._unsent else self._send(first, fds)
        if not done and (fds or self._bound is None):
            raise QueueWouldBlock("the frames before are still on their way")
        self.sent += 1
        if done < len(header) + size:
            self._keep(parts, done)
            self._drained.begin()

    def _keep(self, parts: Sequence[wire.Part], done: int) -> None:
        """Keep for later what remains of a frame when ``done`` bytes of it are sent."""
        self._unsent.extend(memoryview(part).cast("B") for part in parts if len(part))
        self._take_off(done)

    def _take_off(self, done: int) -> None:
        """Forget the first ``done`` bytes of what was to be sent."""
        while done:
            part = self._unsent[0]
            if done < len(part):
                self._unsent[0] = part[done:]
                return
            done -= len(part)
            self._unsent.popleft()

    def _send(self, parts: Sequence[wire.Part], fds: Sequence[int]) -> int:
        """Return how many bytes of a frame the operating system takes."""
        rights: tuple[Any, ...] = ()
        if fds:
            rights = ((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)),)
        try:
            return self._sock.sendmsg(parts, rights, wire.SEND_FLAGS)
        except BlockingIOError:
            return 0
        except ConnectionError as error:
            raise self._end(error) from error

    async def put(
        self, payload: wire.Payload, *, fds: Sequence[int] = (), timeout: float | None = None
    ) -> None:
        """Send one frame as soon as there is room; do not alter ``payload`` afterwards.

        Safe to cancel: the frame is either accepted whole or not at all.

        Raises:
            QueueTimeout: There was no room in ``timeout`` seconds; nothing was sent.
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed.
            OSError: ``fds`` cannot be passed.
            ValueError: ``fds`` are too many for one frame.
        """
        deadline = deadline_after(timeout)
        while True:
            try:
                return self.put_nowait(payload, fds)
            except QueueWouldBlock:
                pass
            if not await self._room().wait(deadline):
                raise QueueTimeout(f"no room in the queue for {timeout} s")

    async def wait_for_room(self) -> None:
        """Wait until ``put_nowait``, which has just found no room, is worth another try.

        Safe to cancel. Also returns when either end is closed.
        """
        await self._room().wait(None)

    def _room(self) -> Watch:
        """Return what tells of room where there is none now."""
        return self._credited if self.credit == 0 else self._drained

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until the operating system has every byte that was put.

        Safe to cancel: the rest is sent by the running loop.

        Raises:
            QueueTimeout: The reader did not make room in time.
            QueueEnded: The reader is gone.
            QueueClosed: This end was closed.
        """
        deadline = deadline_after(timeout)
        while True:
            self._flush()
            self._check()
            if not self._unsent:
                return
            if not await self._drained.wait(deadline):
                raise QueueTimeout(f"the reader made no room for {timeout} s")

    def _flush(self) -> bool:
        """Send a share of the unsent bytes; return whether more are left."""
        share = wire.SHARE
        while self._unsent and share > 0:
            parts = _share_of(tuple(itertools.islice(self._unsent, wire.MAX_PARTS)), share)
            try:
                done = self._sock.sendmsg(parts, (), wire.SEND_FLAGS)
            except BlockingIOError:
                break
            except OSError as error:
                self._end(error)
                break
            share -= done
            self._take_off(done)
        return bool(self._unsent)

    def _hear(self) -> bool:
        self._refill()
        if self._ended is not None:
            self._credited.stop()  # there would be no end of events
        return False

    def _refill(self) -> None:
        """Read all credits that have arrived."""
        size = wire.CREDIT.size * _CREDITS_AT_ONCE
        while self._ended is None:
            try:
                data = self._sock.recv(size)
            except BlockingIOError:
                break
            except OSError as error:
                self._end(error)
                break
            if not data:
                self._end(None)
            # So small a number is sent whole or not at all, so whole numbers are read.
            self.acknowledged += sum(n for (n,) in wire.CREDIT.iter_unpack(data))
            if len(data) < size:
                break

    def _end(self, error: OSError | None) -> QueueEnded:
        """Note that the reader is gone, and with it the reason to send anything."""
        why = f" ({error.strerror})" if error is not None else ""
        self._ended = QueueEnded(f"the reading end is closed{why}")
        self._unsent.clear()
        return self._ended

    def _check(self) -> None:
        if self._closed:
            raise QueueClosed("put on a queue whose writing end was closed")
        if self._ended is not None:
            raise QueueEnded(*self._ended.args)

    def qsize(self) -> int:
        """Return how many frames the reader has not taken yet; 0 when either end is closed.

        Meaningless where the reader's owner grants the credits by hand.
        """
        if not self._closed:
            self._refill()
        return self.sent - self.acknowledged if not self._closed and self._ended is None else 0

    def watch_credit(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` in the running loop when credits arrive, and once if the reader goes."""
        self._credited.listen(wake)

    def detach(self) -> int:
        """Give the descriptor away, to another process; this object is closed.

        Raises:
            QueueError: Frames were sent from here; the new owner could not know of them.
        """
        if self.sent:
            raise QueueError("a writing end that was used cannot be given to another process")
        self._release()
        return self._sock.detach()

    def close(self) -> None:
        """Close this end; the reader reads what was sent and then the end.

        A frame that was still on its way is lost (``QueueBroken``): ``flush`` first.
        """
        if not self._closed:
            self._release()
            self._sock.close()

    def _release(self) -> None:
        self._closed = True
        self._unsent.clear()
        self._credited.close()
        self._drained.close()

    def disown(self) -> None:
        """Close a forked child's copy of this end; the parent's queue goes on unnoticed."""
        self._credited.disown()
        self._drained.disown()
        self.close()


def _share_of(parts: Sequence[wire.Part], share: int) -> Sequence[wire.Part]:
    """Return the beginning of ``parts`` that one system call may move."""
    taken: list[wire.Part] = []
    for part in parts[: wire.MAX_PARTS]:
        if share <= 0:
            break
        whole = memoryview(part).cast("B") if isinstance(part, memoryview) else part
        taken.append(whole if len(whole) <= share else memoryview(whole)[:share])
        share -= len(whole)
    return taken
